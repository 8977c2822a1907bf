"""What runners on other machines share: a job that needs no common disk, and what comes back from it."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from assay.spec.result import Result
from assay.study.runners.folder import Folder
from assay.study.runners.local import Failed, Pool, Silent, Watcher
from assay.study.runners.worker import THREAD_VARIABLES, import_function
from assay.study.trials import Trial

RETRIES = 3
"""Of a trial whose machine was lost. One that raises an error of its own is not tried again: it would raise again."""


class Runner(Protocol):
    """`local.run_trials`, or the same on other machines."""

    def __call__(
        self, trials: Sequence[Trial], folder: Folder, pool: Pool | None = None, watcher: Watcher | None = None
    ) -> list[Failed]: ...


class Lost(Exception):
    """A trial that gave nothing; the message says why."""


class Machines(Protocol):
    """Where jobs run. `submit` begins one; `wait` gives those that ended, each with a call that returns what `work` did
    or raises `Lost`. free: how many more are worth submitting now."""

    def submit(self, job: dict[str, Any], function: str) -> Any: ...
    def wait(self, running: Sequence[Any]) -> list[tuple[Any, Callable[[], Any]]]: ...
    def free(self, running: int) -> int: ...
    def cancel(self, running: Sequence[Any]) -> None: ...


def job_of(trial: Trial, pool: Pool) -> dict[str, Any]:
    """As the local pool's, but for the folders, which `work` makes where it runs. Parts travel by their text."""
    parts = [(Path(path).name, Path(path).read_text("utf-8")) for path in pool.parts]
    return {**trial.job(), "parts": parts, "keep": trial.keep, "threads": pool.threads}


def work(job: dict[str, Any], function: str) -> tuple[list[dict[str, Any]], bytes | None]:
    """Run on another machine: the trial's lines, and the folder of a model that is kept, packed."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(job["threads"])))
    run = import_function(function)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory(prefix="assay-") as name:
        place = Path(name)
        parts = []
        for file, text in job["parts"]:
            (place / file).write_text(text, "utf-8")
            parts.append(str(place / file))
        keep = place / "kept" if job["keep"] else None
        # One room for all trials of a machine and a user, so that timings have no neighbour there either.
        room = Path(tempfile.gettempdir()) / f"assay-room-{os.getuid()}"
        room.mkdir(mode=0o700, exist_ok=True)
        told = {**job, "parts": parts, "keep": str(keep) if keep else None, "room": str(room)}
        lines = run(told, lambda event: None)
        return lines, _packed(keep) if keep is not None and keep.is_dir() else None


def _packed(folder: Path) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        tar.add(folder, arcname=".")
    return held.getvalue()


def run_on(
    machines: Machines, trials: Sequence[Trial], folder: Folder, pool: Pool, watcher: Watcher | None = None
) -> list[Failed]:
    """As `local.run_trials`: every result is on disk before the next one is waited for; Ctrl-C cancels what runs."""
    left, watch = deque(folder.adopt(trials)), watcher or Silent()
    running: dict[Any, Trial] = {}
    failed: list[Failed] = []
    try:
        while left or running:
            for _ in range(min(len(left), max(machines.free(len(running)), 0 if running else 1))):
                trial = left.popleft()
                running[machines.submit(job_of(trial, pool), pool.function)] = trial
                watch.started(trial, 0)
            for handle, result in machines.wait(list(running)):
                trial = running.pop(handle)
                why = _recorded(trial, result, folder, pool)
                failed += [Failed(trial, why)] if why else []
                watch.finished(trial, why)
    finally:
        machines.cancel(list(running))
    return failed


def _recorded(trial: Trial, result: Callable[[], Any], folder: Folder, pool: Pool) -> str | None:
    """Why there is nothing, or None when the trial's lines are on disk."""
    try:
        lines, packed = result()
        results = [Result.model_validate(line) for line in lines]
        if not any(r.kind == "trial" for r in results):
            raise ValueError(f"{pool.function} gave no line of kind trial")
    except Lost as lost:
        return str(lost)
    except (ValidationError, ValueError, TypeError) as error:
        return f"its results are not Results: {error}"
    if packed is not None:
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(folder.checkpoint(trial), filter="data")
    folder.record(trial, results)
    return None
