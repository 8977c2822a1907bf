"""The front of several engines in processes of their own, with the surface of one engine.

`submit`, `cancel`, `step`, `busy`, `stats`: one thread calls them. A process that ends takes its requests with it: they
end with "error", and `problem` names it. Where nobody is left to read or to go on, everything ends so. One that hangs
(it says nothing for `silence_s`) is killed, and has ended.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any, Self

from assay.data.tokenizers import Tokenizer
from assay.engine.apart import wire
from assay.engine.apart.router import ClusterConfig, Role, Router
from assay.engine.apart.worker import Post, work
from assay.engine.chooser import Chooser
from assay.engine.config import EngineConfig, sequence_limit
from assay.engine.engine import Engine, check_request
from assay.engine.request import Request
from assay.engine.runner import Token, check_continues
from assay.model.lm import state_table
from assay.spec.model import ModelSpec

WAIT_S = 0.005  # seconds that `step` waits for something to be said
PATIENCE_S = 2.0  # seconds that a process has to end before it is killed

Event = tuple[int, dict[str, Any] | None, int | None]  # worker, message (None: it has ended), descriptor of a state


@dataclass(eq=False)
class Seat:
    """One worker as the front sees it."""

    number: int
    role: Role
    process: BaseProcess
    pipe: Connection
    why: str = ""
    kind: str = ""  # of the exception that ended it
    stats: dict[str, Any] = field(default_factory=dict)
    layout: str = ""  # of what it hands over
    takes: tuple[str, ...] = ()  # layouts of what it can go on with
    heard: float = float("inf")  # when it last said something; far off until it is ready

    @property
    def name(self) -> str:
        return f"the {self.role} process {self.number} (pid {self.process.pid})"

    def ended(self) -> str:
        """What happened to it."""
        if not self.why:
            self.process.join(PATIENCE_S)
            code = self.process.exitcode
            self.why = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return f"{self.name} has ended: {self.why}"

    def told(self) -> str:
        """The same for a log: of an exception its kind alone, since its message may quote a text."""
        return f"{self.name} has ended: {self.kind}" if self.kind else self.ended()


@dataclass(eq=False)
class Live:
    """A request under way. owed: by choice that has not ended, who has it and the tokens that the router still counts.
    unread: tokens of the prompt likewise, of the worker `reads`."""

    request: Request
    reads: int
    unread: int
    owed: dict[int, tuple[int, int]]


class Cluster:
    """`make` builds an engine of these settings, in each process anew: it must be picklable. Close it at the end.

    A mapping has one for each role. Who reads may take other chunks, budgets, backends and threads than who goes on,
    which may keep keys and values in fewer bits. All else that they store must be alike.
    """

    def __init__(
        self,
        make: Callable[[], Engine] | Mapping[Role, Callable[[], Engine]],
        spec: ModelSpec,
        tokenizer: Tokenizer,
        engine: EngineConfig,
        config: ClusterConfig,
    ) -> None:
        check_continues(spec)
        if config.route == "prefix" and engine.page is None:
            raise ValueError("route: 'prefix' goes by pages, and these engines have rows; accepted: a page size")
        self.spec, self.tokenizer, self.config, self.settings = spec, tokenizer, engine, config
        self.fields, self.dtype = state_table(spec), ""  # the dtype is what the processes say
        self.tokens = sequence_limit(spec, engine.tokens)
        self.problem = ""
        self.failed = False
        self.lost: list[str] = []  # processes that have ended, in words for a log, which takes them out
        self.live: dict[int, Live] = {}
        self.router = Router(config, engine.page or 1)
        self.chooser = Chooser(spec.vocab, tokenizer, "cpu")  # says here what would be refused there
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._requests = 0
        self._lent = Counter[tuple[int, int]]()  # bytes of states under way, by (from, to)
        self._closed = threading.Event()
        key = secrets.token_bytes(32)
        makes = make if isinstance(make, Mapping) else dict.fromkeys(config.roles, make)
        posts = [Post(role, key, config.in_flight) for role in config.roles]
        self.seats = [self._seat(i, post, makes[post.role]) for i, post in enumerate(posts)]
        try:
            self._await_all()
            self._check_layouts()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Kill who has fallen silent: the front may wait for it to read, so another thread looks."""
        for seat in self.seats:
            seat.heard = time.monotonic()
        while not self._closed.wait(min(1.0, self.settings.silence_s / 4)):
            for seat in self.seats:
                if time.monotonic() - seat.heard > self.settings.silence_s and seat.process.is_alive():
                    seat.why = seat.why or f"not heard of for {self.settings.silence_s:g} s, and killed"
                    seat.process.kill()

    def _seat(self, number: int, post: Post, make: Callable[[], Engine]) -> Seat:
        context = multiprocessing.get_context("spawn")
        mine, its = context.Pipe()
        process = context.Process(target=work, args=(its, post, make), name=f"{post.role} {number}", daemon=True)
        process.start()
        its.close()  # so that the pipe ends with the process
        seat = Seat(number, post.role, process, mine)
        threading.Thread(target=_listen, args=(seat, self._events), daemon=True).start()
        return seat

    def _await_all(self) -> None:
        missing, until = {seat.number for seat in self.seats}, time.monotonic() + self.settings.start_s
        while missing:
            try:
                number, message, _ = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                names = ", ".join(self.seats[number].name for number in sorted(missing))
                raise TimeoutError(f"{names}: not ready after {self.settings.start_s:g} s") from None
            seat = self.seats[number]
            if message is None or message["is"] == "broken":
                if message is not None and message["kind"] == "ValueError":
                    raise ValueError(message["why"])
                seat.why = message["why"] if message is not None else ""
                raise RuntimeError(seat.ended())
            seat.stats, self.dtype = message["stats"], message["dtype"]
            seat.layout, seat.takes = message["layout"], tuple(message["takes"])
            missing.discard(number)

    def _check_layouts(self) -> None:
        """ValueError where one could not go on with what another has read."""
        for source in (seat for seat in self.seats if seat.role == "prefill"):
            for target in (seat for seat in self.seats if seat.role == "decode"):
                if source.layout not in target.takes:
                    raise ValueError(
                        f"{target.name} cannot go on with what {source.name} stores; accepted: the same model, dtype, "
                        "page and context, and keys and values in fewer bits for those who go on alone"
                    )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def busy(self) -> bool:
        return bool(self.live)

    def submit(self, request: Request) -> int:
        """Take a request in; its number. ValueError names what cannot be served; RuntimeError: nobody is left to."""
        if self.failed:
            raise RuntimeError(self.problem)
        check_request(self.spec, request, self.tokens)
        self.chooser.enter(0, request)
        self.chooser.leave(0)
        worker, number = self.router.enter(request), self._requests
        self._requests += 1
        owed = dict.fromkeys(range(request.n), (worker, self.router.says(worker, request)))
        self.live[number] = Live(request, worker, len(request.prompt), owed)
        self._tell(worker, {"do": "submit", "number": number, "request": request.model_dump(mode="json")})
        return number

    def cancel(self, number: int) -> None:
        """End a request wherever it stands. One that has ended stays so."""
        live = self.live.pop(number, None)
        if live is not None:
            self._read(live)
            for worker, tokens in live.owed.values():
                self.router.did(worker, tokens)
            for worker in {live.reads, *(worker for worker, _ in live.owed.values())}:
                self._tell(worker, {"do": "cancel", "number": number})

    def step(self, wait_s: float = WAIT_S) -> list[Token]:
        """What was said since; waits a little where nothing was."""
        said: list[Token] = []
        for number, message, state in self._heard(wait_s):
            if message is None:
                said += self._lost(self.seats[number])
            elif message["is"] == "said":
                said += self._said(number, message)
            elif message["is"] == "handed":
                assert state is not None
                self._pass_on(number, message, state)
            elif message["is"] == "taken":
                self._credit(message["from"], number, message["bytes"])
            elif message["is"] == "broken":
                self.seats[number].why, self.seats[number].kind = message["why"], message["kind"]
            else:
                self.seats[number].stats = message["stats"]
        return said

    def stats(self) -> dict[str, Any]:
        """The last reports of all workers, added up."""
        reports = [seat.stats for seat in self.seats if seat.number in self.router.loads]
        whole: dict[str, Any] = {}
        for report in reports:
            for name, value in report.items():
                if isinstance(value, int | list | tuple):
                    whole[name] = whole[name] + value if name in whole else value
        held = whole.get("held_bytes", 0)
        return whole | {"fragmentation": 1 - whole["filled_bytes"] / held if held else 0.0, "workers": len(reports)}

    def close(self) -> None:
        """End all processes, within `PATIENCE_S`."""
        self._closed.set()
        for seat in self.seats:
            self._tell(seat.number, {"do": "stop"})
        until = time.monotonic() + PATIENCE_S
        for seat in self.seats:
            seat.process.join(max(0.0, until - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        for seat in self.seats:
            if seat.process.is_alive():
                seat.process.kill()
                seat.process.join(PATIENCE_S)
        for _, _, state in self._heard(0.0):
            if state is not None:
                os.close(state)

    def _heard(self, wait_s: float) -> Iterator[Event]:
        """Everything that has come; waits for the first of it."""
        try:
            yield self._events.get(timeout=wait_s) if wait_s else self._events.get_nowait()
            while True:
                yield self._events.get_nowait()
        except Empty:
            return

    def _tell(self, worker: int, message: wire.Message, state: int | None = None) -> None:
        """That a worker is gone is heard from its pipe's end."""
        try:
            wire.put(self.seats[worker].pipe, message, state)
        except OSError:
            return

    def _read(self, live: Live) -> None:
        self.router.did(live.reads, live.unread)
        live.unread = 0

    def _said(self, worker: int, message: wire.Message) -> list[Token]:
        tokens = [token for token in map(wire.to_token, message["tokens"]) if token.request in self.live]
        for token in tokens:
            live = self.live[token.request]
            self._read(live)
            _, owed = live.owed[token.choice]
            done = owed if token.finish is not None else 1
            live.owed[token.choice] = (worker, owed - done)
            self.router.did(worker, done)
            if token.finish is not None:
                del live.owed[token.choice]
            if not live.owed:
                del self.live[token.request]
        return tokens

    def _pass_on(self, source: int, message: wire.Message, state: int) -> None:
        live = self.live.get(message["number"])
        with open(state, "rb"):
            if live is None:
                self._tell(source, {"do": "credit", "bytes": message["bytes"]})
                return
            target = self.router.passes(live.request)
            self._lent[source, target] += message["bytes"]
            live.owed[message["choice"]] = (target, live.request.max_new - 1)
            self._tell(target, {**message, "do": "adopt", "from": source}, state)

    def _credit(self, source: int, target: int, count: int) -> None:
        """What was lent has been taken in, or is lost."""
        self._lent[source, target] -= count
        self._tell(source, {"do": "credit", "bytes": count})

    def _lost(self, seat: Seat) -> list[Token]:
        """A process has ended, and with it what only it could go on with."""
        if self.failed or seat.number not in self.router.loads:
            return []
        self.problem = seat.ended()
        self.lost.append(seat.told())
        self.failed = not self.router.lose(seat.number)
        for (source, target), count in list(self._lent.items()):
            if target == seat.number and count:
                self._credit(source, target, count)
        ends = []
        for number, live in list(self.live.items()):
            if self.failed or seat.number in {worker for worker, _ in live.owed.values()}:
                ends += [Token(number, None, "", "error", choice, why=self.problem) for choice in live.owed]
                self.cancel(number)
        if self.failed:
            self._kill()
        return ends


def _listen(seat: Seat, events: SimpleQueue[Event]) -> None:
    """Takes in whatever a worker says, so that it never waits for the front."""
    try:
        while True:
            message, state = wire.get(seat.pipe)
            seat.heard = time.monotonic()
            if message["is"] != "beat":
                events.put((seat.number, message, state))
    except (EOFError, OSError, RuntimeError):  # the last: it ended between a message and its state
        events.put((seat.number, None, None))
