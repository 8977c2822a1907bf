"""Who is still there: when processes can no longer reach one another, which one is to blame."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

CALL_S = 5.0
"""How long a process has to answer when the others ask who is there."""
BEAT_S = 0.2
UNTOLD = (
    "process 0, on whose machine the store is that could tell who is there, does not answer: that machine is gone, or "
    "the network between"
)
T = TypeVar("T")
WORDS = ("gloo", "connection", "socket", "nccl", "timed out", "timeout")


class Lost(ConnectionError):
    """Another process is gone, and its number is in the message."""


class Roll:
    """The processes of a run, which answer one another through a store, also while they wait in a collective.

    The store is that of the launcher, which outlives a process. A process that is killed or stopped does not answer;
    one that is busy with something else does, and says how many exchanges it has made (`progress`).
    """

    def __init__(self, store: Store, number: int, processes: int) -> None:
        self.store, self.number, self.processes = store, number, processes
        self.progress: Callable[[], int] = int
        self._done = threading.Event()
        self._answers = threading.Thread(target=self._answer, daemon=True)
        self._answers.start()

    def _answer(self) -> None:
        """Answer the first call."""
        while not self._done.wait(BEAT_S):
            try:
                if self.store.check(["roll/call"]):
                    self.store.set(f"roll/here/{self.number}", str(self.progress()))
                    return
            except RuntimeError:  # the store went first: nobody can be answered
                return

    def close(self) -> None:
        self._done.set()
        self._answers.join(2 * BEAT_S)  # a store that does not answer holds it for ever

    def tell(self, reason: str) -> None:
        """Before this process stops: why."""
        self.store.set(f"roll/stopped/{self.number}", reason)

    def _behind(self, others: list[int]) -> str:
        made = {i: int(self.store.get(f"roll/here/{i}")) for i in others} | {self.number: self.progress()}
        least = min(made.values())
        late = [str(i) for i, count in sorted(made.items()) if count == least]
        if len(late) == len(made):
            return "all processes are there, but could not reach one another"
        return (
            f"process {', '.join(late)} is there, but behind: {least} exchanges made, the others {max(made.values())}"
        )

    def call(self) -> str:
        """Ask who is there, and say who is not."""
        self.store.set("roll/call", "")
        end, others = time.monotonic() + CALL_S, [i for i in range(self.processes) if i != self.number]
        while time.monotonic() < end:
            stopped = [i for i in others if self.store.check([f"roll/stopped/{i}"])]
            if stopped:
                told = [f"process {i} stopped: {self.store.get(f'roll/stopped/{i}').decode()}" for i in stopped]
                return "; ".join(told)
            if all(self.store.check([f"roll/here/{i}"]) for i in others):
                return self._behind(others)
            time.sleep(BEAT_S)
        missing = [str(i) for i in others if not self.store.check([f"roll/here/{i}"])]
        many = "es" if len(missing) > 1 else ""
        return f"process{many} {', '.join(missing)} of 0 to {self.processes - 1}: killed, or no longer to be reached"


@contextmanager
def patient() -> Iterator[None]:
    """A launcher that saw a process die ends the others at once: they are to say why first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def guarded(roll: Roll) -> Iterator[None]:
    """Say to the others why this process stops; and find out why they did. Raises Lost for a broken connection."""
    try:
        yield
    except BaseException as error:
        if not broken(error):
            asked(roll.tell, f"{type(error).__name__}: {error}"[:500])
            raise
        with patient():
            why = asked(roll.call)
        raise Lost(why or UNTOLD) from error
    finally:
        roll.close()


def asked(ask: Callable[..., T], *args: Any) -> T | None:
    """None where the store is gone as well, or cannot be reached: then what asks it may never come back."""
    found: list[T] = []

    def work() -> None:
        with suppress(RuntimeError):
            found.append(ask(*args))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * CALL_S)
    return found[0] if found else None


def broken(error: BaseException) -> bool:
    """Whether an error is that of a collective."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)
