"""A study's folder: locked while in use, bound to one plan, results appended as they come."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from assay.spec.result import Result, dumps, read_results, write_results
from assay.study.plan import Trial, Use

OF_A_RUN = ("trial", "measure", "failure")


class Folder:
    """`results.jsonl` and `plan.json` under one lock. Use it as a context; a second user is refused.

    A run counts as done once its `trial` line is there; on opening, lines of a run without one are dropped, since
    that run was cut off and will be repeated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.results = self.path / "results.jsonl"
        self._plan = self.path / "plan.json"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"{self.path} is a file; a folder is expected") from None
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{self.path} is in use by another run; wait for it or choose another --out") from None
        self._lock = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None

    def held(self) -> dict[str, Any] | None:
        """What the folder's plan says of itself; None for a new folder. ValueError where it cannot be read."""
        if not self._plan.exists():
            return None
        try:
            held: dict[str, Any] = json.loads(self._plan.read_text())
            if not isinstance(held["digest"], str):
                raise ValueError("digest")
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self._plan}: not a plan; remove the folder or choose another --out") from None
        return held

    def bind(self, digest: str, about: dict[str, Any]) -> dict[str, Any]:
        """Tie the folder to a plan; what was said when it was first bound is returned, so that a resumed run agrees.

        Raises ValueError, naming both digests, where the folder holds another plan.
        """
        if not self._plan.exists():
            if self.results.exists():
                raise ValueError(f"{self.path} holds results and no plan.json: they are of no study this could resume")
            self._replace(self._plan, json.dumps({"digest": digest, **about}, indent=1) + "\n")
        held = self.held()
        assert held is not None
        found = held["digest"]
        if found != digest:
            raise ValueError(
                f"{self.path} holds another study's plan ({held.get('study')}, {held.get('budget')}: {found}) and this "
                f"is {about.get('study')}, {about.get('budget')}: {digest}; choose another --out"
            )
        self._drop_cut_off()
        return held

    def read(self) -> list[Result]:
        return read_results(self.results) if self.results.exists() else []

    def checkpoint(self, trial: Trial) -> Path:
        """Where a trial that keeps its model puts it."""
        return self.path.resolve() / "checkpoints" / f"{trial.uses[0].study}-{trial.uses[0].arm}"

    def append(self, results: Iterable[Result]) -> None:
        """All of them or none: a write that fails is taken back, so that what is there stays whole."""
        size = self.results.stat().st_size if self.results.exists() else 0
        try:
            write_results(self.results, results)
        except OSError as error:
            if self.results.exists():
                os.truncate(self.results, size)
            raise _explained(error, self.results) from error

    def rewrite(self, derived: Sequence[Result]) -> None:
        """Put these in place of every line that is not of a run: what is concluded is concluded afresh."""
        runs = [r for r in self.read() if r.kind in OF_A_RUN]
        self._replace(self.results, "".join(dumps(r) + "\n" for r in [*derived, *runs]))

    def adopt(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that still have to run. A run that already has a Result under other names is copied from there."""
        runs = self._runs()
        left, copies = [], []
        for trial in trials:
            found = [lines for labels, lines in runs.items() if labels[2:] == trial.key]
            for use in trial.uses:
                if (use.study, use.arm, *trial.key) in runs:
                    continue
                source = next((lines for lines in found if set(use.measurements) <= _measured(lines)), None)
                if source is None:
                    left.append(trial)
                    break
                copies += relabelled(source, trial, use)
        self.append(copies)
        return left

    def record(self, trial: Trial, results: Sequence[Result]) -> None:
        """A finished trial's lines, once for every stage that uses it and does not have them yet."""
        runs = self._runs()
        uses = [u for u in trial.uses if (u.study, u.arm, *trial.key) not in runs]
        self.append([line for use in uses for line in relabelled(results, trial, use)])

    def _runs(self) -> dict[tuple[str, str, str, str, int], list[Result]]:
        """(study, arm, spec digest, recipe digest, seed) -> the lines of every run that is done."""
        out: dict[tuple[str, str, str, str, int], list[Result]] = {}
        for r in self.read():
            if r.kind in OF_A_RUN and None not in (r.arm, r.spec_digest, r.recipe_digest, r.seed):
                out.setdefault((r.study, r.arm, r.spec_digest, r.recipe_digest, r.seed), []).append(r)  # type: ignore[arg-type]
        return {labels: lines for labels, lines in out.items() if any(r.kind == "trial" for r in lines)}

    def _drop_cut_off(self) -> None:
        results = self.read()
        done = {(r.study, r.arm, r.seed) for r in results if r.kind == "trial"}
        kept = [r for r in results if r.kind not in OF_A_RUN or r.seed is None or (r.study, r.arm, r.seed) in done]
        if len(kept) < len(results):
            self._replace(self.results, "".join(dumps(r) + "\n" for r in kept))

    def _replace(self, path: Path, text: str) -> None:
        """Atomic: the old file or the new one, never half."""
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _explained(error, path) from error


def relabelled(results: Iterable[Result], trial: Trial, use: Use) -> list[Result]:
    """A run's lines under one stage's names, without the measurements that only another stage asked for."""
    foreign = {name for name, _ in trial.measurements} - set(use.measurements)
    labels = {"study": use.study, "arm": use.arm, "seed": trial.seed}
    digests = {"spec_digest": trial.spec_digest, "recipe_digest": trial.recipe_digest}
    kept = [r for r in results if not (r.kind == "measure" and r.values["what"] in foreign)]
    return [r.model_copy(update={**labels, **digests}) for r in kept]


def _measured(lines: Iterable[Result]) -> set[str]:
    return {str(r.values["what"]) for r in lines if r.kind == "measure"}


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "no space left on the disk: results so far are kept; make room and run the same command again"
        return OSError(error.errno, message, str(path))
    return error
