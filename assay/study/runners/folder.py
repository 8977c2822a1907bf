"""A study's folder: locked while in use, bound to one plan, results appended as they come."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from assay.spec.result import Result, dumps, read_results, write_results
from assay.study.trials import Trial, Use

OF_A_TRIAL = ("trial", "measure", "failure")
POINT = ("loss_nats", "diverged", "tokens", "steps", "train_s")
FAILURES = "failures"
Labels = tuple[str, str, bool]
"""study, arm, whether it is a point of the sweep"""
Key = tuple[str, str, int, float]


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
        self.check(held, digest, about)
        self._drop_cut_off()
        return held

    def check(self, held: dict[str, Any], digest: str, about: dict[str, Any]) -> None:
        """ValueError, naming both digests, where what is `held` is not this plan."""
        if held["digest"] != digest:
            raise ValueError(
                f"{self.path} holds another study's plan ({held.get('study')}, {held.get('budget')}: {held['digest']}) "
                f"and this is {about.get('study')}, {about.get('budget')}: {digest}; choose another --out"
            )

    def read(self) -> list[Result]:
        return read_results(self.results) if self.results.exists() else []

    def checkpoint(self, trial: Trial) -> Path:
        """Where a trial that keeps its model puts it."""
        return self.path.resolve() / trial.uses[0].study

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
        runs = [r for r in self.read() if _is_of_a_run(r)]
        self._replace(self.results, "".join(dumps(r) + "\n" for r in [*derived, *runs]))

    def adopt(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that still have to run. A run that already has a Result under other names is copied from there."""
        self._drop_superseded(trials)
        runs = self._runs()
        left, copies = [], []
        for trial in trials:
            sources = _sources(trial, runs)
            if None in sources.values():
                left.append(trial)
            else:
                copies += [line for use, x in sources.items() for line in relabelled(x or [], trial, use)]
        self.append(copies)
        return left

    def left(self, trials: Sequence[Trial]) -> list[Trial]:
        """As `adopt`, and nothing is changed."""
        runs = self._runs()
        return [trial for trial in trials if None in _sources(trial, runs).values()]

    def record(self, trial: Trial, results: Sequence[Result]) -> None:
        """A finished trial's lines, once for every use that does not have them yet."""
        runs = self._runs()
        uses = [use for use in trial.uses if (_labels(use), trial.key) not in runs]
        lines = [line for use in uses for line in relabelled(results, trial, use)]
        if trial.keep:
            saved = self.checkpoint(trial).name  # within this folder, which may be moved
            lines = [_with(line, checkpoint=saved) if line.kind == "trial" else line for line in lines]
        self.append(lines)

    def _runs(self) -> dict[tuple[Labels, Key], list[Result]]:
        """The lines of every run that is done."""
        out: dict[tuple[str, str, int], list[Result]] = {}
        done: dict[tuple[Labels, Key], list[Result]] = {}
        for r in self.read():
            if not _is_of_a_run(r):
                continue
            assert r.arm is not None and r.seed is not None
            if r.kind == "sweep":
                done[(r.study, r.arm, True), _key(r)] = [r]
                continue
            lines = out.setdefault((r.study, r.arm, r.seed), [])
            lines.append(r)
            if r.kind == "trial":
                done[(r.study, r.arm, False), _key(r)] = lines
        return done

    def _drop_superseded(self, trials: Sequence[Trial]) -> None:
        """Forget runs under the names of these trials that are not theirs: another rate was found, or another model
        chosen, after runs that had failed were made up for; or the model that was to be kept is gone."""
        planned = {(u.study, u.arm, t.seed): t for t in trials for u in t.uses if not u.sweeps}
        lines = [r for r in self.read() if r.kind == "trial" and (r.study, r.arm, r.seed) in planned]
        stale = set()
        for r in lines:
            assert r.arm is not None and r.seed is not None
            trial = planned[r.study, r.arm, r.seed]
            lost = trial.keep and not (r.values.get("checkpoint") and self.checkpoint(trial).is_dir())
            if _key(r) != trial.key or lost:
                stale.add((r.study, r.arm, r.seed))
        if stale:
            self._drop(lambda r: r.kind in OF_A_TRIAL and (r.study, r.arm, r.seed) in stale)

    def _drop_cut_off(self) -> None:
        done = {(r.study, r.arm, r.seed) for r in self.read() if r.kind == "trial"}
        self._drop(lambda r: r.kind in OF_A_TRIAL and r.seed is not None and (r.study, r.arm, r.seed) not in done)

    def _drop(self, unwanted: Callable[[Result], bool]) -> None:
        results = self.read()
        kept = [r for r in results if not unwanted(r)]
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
    """A run's lines under one stage's names, without the measurements that only another stage asked for.

    The `trial` line says the learning rate and what was measured; as a point of a sweep it is all there is.
    """
    labels = {"study": use.study, "arm": use.arm, "seed": trial.seed}
    digests = {"spec_digest": trial.spec_digest, "recipe_digest": trial.recipe_digest}
    out = []
    for r in results:
        made = r.model_copy(update={**labels, **digests})
        if use.sweeps:
            if r.kind in ("trial", "sweep"):
                values = {name: r.values.get(name) for name in POINT}
                out.append(made.model_copy(update={"kind": "sweep", "values": {**values, "learning_rate": trial.rate}}))
        elif r.kind == "trial":
            kept = {name: value for name, value in r.values.items() if name != "checkpoint"}
            about = {"learning_rate": trial.rate, "measured": list(use.measurements)}
            out.append(made.model_copy(update={"values": {**kept, **about}}))
        elif str(r.values["what"] if r.kind == "measure" else FAILURES) in use.measurements:
            out.append(made)
    return out


def _sources(trial: Trial, runs: Mapping[tuple[Labels, Key], list[Result]]) -> dict[Use, list[Result] | None]:
    """For every use without a Result: the lines that it can be copied from, or None."""
    found = [] if trial.keep else [lines for (_, key), lines in runs.items() if key == trial.key]
    missing = [use for use in trial.uses if (_labels(use), trial.key) not in runs]
    return {use: next((lines for lines in found if _covers(lines, use)), None) for use in missing}


def _with(line: Result, **values: Any) -> Result:
    return line.model_copy(update={"values": {**line.values, **values}})


def _labels(use: Use) -> Labels:
    return use.study, use.arm, use.sweeps


def _key(run: Result) -> Key:
    """What `Trial.key` is for the run of a `trial` or `sweep` line."""
    rate = run.values.get("learning_rate")
    number = float(rate) if isinstance(rate, int | float) else math.nan
    return str(run.spec_digest), str(run.recipe_digest), int(run.seed or 0), number


def _covers(lines: Sequence[Result], use: Use) -> bool:
    """Whether a use can be copied from these lines of another."""
    if use.sweeps:
        return True
    trial = next((r for r in lines if r.kind == "trial"), None)
    measured: Any = trial.values.get("measured") if trial else None
    return trial is not None and set(use.measurements) <= set(measured or ())


def _is_of_a_run(result: Result) -> bool:
    """Not concluded from others, which a line of the whole sweep is."""
    return result.arm is not None and result.seed is not None and result.kind in (*OF_A_TRIAL, "sweep")


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "no space left on the disk: results so far are kept; make room and run the same command again"
        return OSError(error.errno, message, str(path))
    return error
