"""Results, read as one number a seed: what verdicts, claims and the synthesis stand on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from assay.spec.result import Result
from assay.study.claims import Filter

HIGHER_IS_BETTER = ("accuracy", "tok_s", "mfu", "score", "in_context_nats")
# What a run costs is known whether or not it diverged.
SIZES = ("params_", "state_bytes", "train_flops", "tokens", "steps")


def lower_is_better(metric: str) -> bool:
    """By the name's ending: accuracies, rates and scores are better high; losses, times and bytes low."""
    return not metric.endswith(HIGHER_IS_BETTER)


class Evidence:
    """One study's trials and measurements. A run that diverged gives NaN for everything but its sizes."""

    def __init__(self, results: Iterable[Result], study: str) -> None:
        mine = [r for r in results if r.study == study and r.arm is not None and r.seed is not None]
        self.study = study
        self._trials = {(r.arm, r.seed): r.values for r in mine if r.kind == "trial"}
        self._measures = [r for r in mine if r.kind == "measure" and (r.arm, r.seed) in self._trials]

    def arms(self) -> list[str]:
        """The arms with a trial, in the order first seen."""
        return list(dict.fromkeys(str(arm) for arm, _ in self._trials))

    def samples(self, metric: str, arm: str, filters: Mapping[str, Filter] | None = None) -> dict[int, float]:
        """seed -> value. `what.column` is the mean over the measurement's rows that the filters choose."""
        what, _, column = metric.rpartition(".")
        seeds = sorted(seed for a, seed in self._trials if a == arm and seed is not None)
        out = {}
        for seed in seeds:
            values = self._trials[arm, seed]
            found = self._rows(what, column, (arm, seed), filters or {}) if what else [values.get(column)]
            numbers = [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)]
            if values.get("diverged") is True and not column.startswith(SIZES):
                out[seed] = math.nan
            elif numbers:
                out[seed] = math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else math.nan
        return out

    def _rows(self, what: str, column: str, run: tuple[str, int], filters: Mapping[str, Filter]) -> list[Any]:
        rows: list[Any] = []
        for result in self._measures:
            if (result.arm, result.seed) == run and result.values["what"] == what:
                rows += _dicts(result.values["rows"])
        return [row[column] for row in rows if column in row and _chosen(row, filters)]

    def mean(self, metric: str, arm: str) -> float | None:
        """Over the seeds; None without one, NaN when a seed diverged."""
        values = list(self.samples(metric, arm).values())
        return math.fsum(values) / len(values) if values else None


def _dicts(rows: Any) -> Sequence[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _chosen(row: Mapping[str, Any], filters: Mapping[str, Filter]) -> bool:
    return all(key in row and _same(row[key], wanted) for key, wanted in filters.items())


def _same(value: Any, wanted: Filter) -> bool:
    if isinstance(value, str) or isinstance(wanted, str):
        return str(value) == str(wanted)
    return isinstance(value, int | float) and math.isclose(value, wanted, rel_tol=1e-9)
