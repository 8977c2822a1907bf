"""Trials on this machine: a persistent pool of single-threaded processes, one a core.

One pipe a worker rather than a shared queue: a worker that is killed while it writes can spoil nothing but its own.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from pydantic import ValidationError

from assay.spec.result import Result
from assay.study.runners.folder import Folder
from assay.study.runners.worker import THREAD_VARIABLES, work
from assay.study.trials import Trial

RUN_TRIAL = "assay.study.trial:run_trial"
POLL_S = 0.5


@dataclass(frozen=True)
class Failed:
    """A trial that gave no Result, and why. It is tried again when the study is run again."""

    trial: Trial
    why: str


class Watcher(Protocol):
    """Told what happens while trials run; `table.Live` draws it."""

    def started(self, trial: Trial, worker: int) -> None: ...
    def progressed(self, trial: Trial, event: dict[str, Any]) -> None: ...
    def finished(self, trial: Trial, why: str | None) -> None: ...


class Silent:
    def started(self, trial: Trial, worker: int) -> None: ...
    def progressed(self, trial: Trial, event: dict[str, Any]) -> None: ...
    def finished(self, trial: Trial, why: str | None) -> None: ...


@dataclass(frozen=True)
class Pool:
    """How to run: `function` is `package.module:name`, called as function(job, progress) -> list of Result dicts.

    `progress({"fraction": 0..1, "loss_nats": ...})` may be called as often as one likes. `timeout_s` is for one trial.
    `parts`: the user's own mechanisms, files that each trial is told to load (`job["parts"]`).
    """

    workers: int = 0
    function: str = RUN_TRIAL
    threads: int = 1
    timeout_s: float | None = None
    parts: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Zero workers means one for each core that this process may use."""
        return self.workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    trial: Trial | None = None
    is_ready: bool = False
    since: float = field(default_factory=time.monotonic)


def run_trials(
    trials: Sequence[Trial], folder: Folder, pool: Pool | None = None, watcher: Watcher | None = None
) -> list[Failed]:
    """Run what the (open) folder has no Result for; every result is on disk before the next one is waited for.

    A crash, a kill, an exception or a timeout makes a Failed. Raises KeyboardInterrupt after stopping the workers.
    """
    left = deque(folder.adopt(trials))
    if not left:
        return []
    run = _Run(folder, pool or Pool(), watcher or Silent(), left)
    try:
        return run.all()
    finally:
        run.stop()


class _Run:
    def __init__(self, folder: Folder, pool: Pool, watcher: Watcher, left: deque[Trial]) -> None:
        self.folder, self.pool, self.watcher, self.left = folder, pool, watcher, left
        self.workers: list[_Worker] = []
        self.failed: list[Failed] = []

    def all(self) -> list[Failed]:
        self.workers = [_start(self.pool) for _ in range(min(self.pool.size, len(self.left)))]
        while self.workers:
            pipes = {w.pipe: w for w in self.workers}
            ready = wait([*pipes, *(w.process.sentinel for w in self.workers)], POLL_S)
            for worker in list(self.workers):
                if worker.pipe in ready:
                    self._hear(worker)
                elif worker.process.sentinel in ready:
                    self._lost(worker)
                elif self._is_overdue(worker):
                    worker.process.kill()
                    self._lost(worker, f"stopped after {self.pool.timeout_s:g} s, the limit for one trial")
        return self.failed

    def stop(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()

    def _hear(self, worker: _Worker) -> None:
        try:
            kind, payload = worker.pipe.recv()
        except (EOFError, OSError):
            return self._lost(worker)
        if kind == "broken":
            raise ValueError(payload)
        if kind == "progress":
            assert worker.trial is not None
            return self.watcher.progressed(worker.trial, payload)
        if kind == "done":
            self._done(worker, payload)
        elif kind == "failed":
            self._failed(worker, payload)
        worker.is_ready = True
        self._next(worker)

    def _next(self, worker: _Worker) -> None:
        """Hand over the next trial, or let the worker go."""
        if not self.left:
            worker.pipe.close()
            worker.process.join()
            self.workers.remove(worker)
            return
        worker.trial, worker.since = self.left.popleft(), time.monotonic()
        self.watcher.started(worker.trial, worker.process.pid or 0)
        try:
            worker.pipe.send(self._job(worker.trial))
        except OSError:
            self._lost(worker)

    def _job(self, trial: Trial) -> dict[str, Any]:
        keep = str(self.folder.checkpoint(trial)) if trial.keep else None
        return {**trial.job(), "parts": list(self.pool.parts), "keep": keep, "room": str(self.folder.path)}

    def _done(self, worker: _Worker, lines: list[dict[str, Any]]) -> None:
        trial = worker.trial
        assert trial is not None
        try:
            results = [Result.model_validate(line) for line in lines]
            if not any(r.kind == "trial" for r in results):
                raise ValueError(f"{self.pool.function} gave no line of kind trial")
        except (ValidationError, ValueError) as error:
            return self._failed(worker, f"its results are not Results: {error}")
        self.folder.record(trial, results)
        worker.trial = None
        self.watcher.finished(trial, None)

    def _failed(self, worker: _Worker, why: str) -> None:
        trial, worker.trial = worker.trial, None
        assert trial is not None
        self.failed.append(Failed(trial, why))
        self.watcher.finished(trial, why)

    def _lost(self, worker: _Worker, why: str | None = None) -> None:
        """A process is gone: its trial failed, and another process takes its place while there is work."""
        worker.process.join()
        why = why or _death(worker.process)
        worker.pipe.close()
        self.workers.remove(worker)
        if worker.trial is not None:
            self._failed(worker, why)
        elif not worker.is_ready:
            raise ChildProcessError(f"a worker {why} before it took a trial")
        if len(self.left) > sum(w.trial is None for w in self.workers):
            self.workers.append(_start(self.pool))

    def _is_overdue(self, worker: _Worker) -> bool:
        limit = self.pool.timeout_s
        return limit is not None and worker.trial is not None and time.monotonic() - worker.since > limit


def _start(pool: Pool) -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, pool.function, pool.threads), daemon=True)
    _with_threads(pool.threads, process.start)
    theirs.close()
    return _Worker(process, ours)


def _with_threads(threads: int, start: Callable[[], None]) -> None:
    """The child reads these as it imports its main module, before any line of ours; ours are put back."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _death(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"
    return f"ended with exit code {code}"
