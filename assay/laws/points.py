"""What a law is fitted to: runs as parameters, tokens, FLOPs and a loss. Read from Results, or from a table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from assay.spec.result import Result, read_results

Array = NDArray[np.float64]
COUNTS = ("total", "active", "without_embedding", "active_without_embedding")
"""How parameters may be counted. Active: an expert's times the share of tokens it sees. Embedding: the input table and
an untied head."""
COLUMNS = {"params": ("params", "params_total", "N"), "tokens": ("tokens", "D"), "loss": ("loss_nats", "loss", "L")}
FLOPS = ("train_flops", "flops", "C")
SAME = 1.1
"""Budgets of FLOPs within this ratio are one rung."""


@dataclass(frozen=True)
class Points:
    """Runs side by side: arrays of equal length. params, tokens, flops (of the whole training) and loss in nats."""

    params: Array
    tokens: Array
    flops: Array
    loss: Array

    def __post_init__(self) -> None:
        for name in ("params", "tokens", "flops", "loss"):
            values = getattr(self, name)
            if len(values) != len(self.params) or not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError(f"{name}: accepted: one number above 0 for each run")

    def __len__(self) -> int:
        return len(self.params)

    def take(self, chosen: Any) -> Self:
        """The runs at these places, or where a mask is true."""
        return type(self)(self.params[chosen], self.tokens[chosen], self.flops[chosen], self.loss[chosen])

    def with_loss(self, loss: Array) -> Self:
        return type(self)(self.params, self.tokens, self.flops, loss)

    @property
    def rungs(self) -> list[NDArray[np.int64]]:
        """The places of runs of one budget of FLOPs, the smallest budget first."""
        order = np.argsort(self.flops, kind="stable")
        ends = np.flatnonzero(np.diff(np.log(self.flops[order])) > math.log(SAME)) + 1
        return list(np.split(order, ends))

    @property
    def largest(self) -> NDArray[np.bool_]:
        """The runs of the largest budget: the top rung where runs come in rungs, else the tenth with most FLOPs."""
        rungs = self.rungs
        top = rungs[-1]
        if 2 * len(rungs) > len(self):
            top = np.concatenate(rungs)[-max(1, len(self) // 10) :]
        mask = np.zeros(len(self), dtype=bool)
        mask[top] = True
        return mask


def from_rows(rows: Iterable[Mapping[str, Any]], count: str = "total", where: str = "points") -> Points:
    """Rows of numbers: `params` (or `params_total`, `N`), `tokens` (`D`), `loss_nats` (`loss`, `L`), and, where known,
    `train_flops` (`flops`, `C`; else 6 x params x tokens), `params_active`, `params_embedding`."""
    if count not in COUNTS:
        raise ValueError(f"count {count!r}; accepted: {', '.join(COUNTS)}")
    found = [_row(row, count, f"{where}, run {number}") for number, row in enumerate(rows, 1)]
    if not found:
        raise ValueError(f"{where}: no runs; accepted: a line for each run")
    return Points(*np.array(found, dtype=np.float64).T)


def _row(row: Mapping[str, Any], count: str, where: str) -> tuple[float, float, float, float]:
    total, tokens, loss = (_number(row, names, where) for names in COLUMNS.values())
    known = {name: row[name] for name in FLOPS if row.get(name) not in (None, "")}
    flops = _number(known, FLOPS, where) if known else 6.0 * total * tokens
    params = _number(row, ("params_active",), where) if count.startswith("active") else total
    if count.endswith("without_embedding"):
        params -= _number(row, ("params_embedding",), where)
    return params, tokens, flops, loss


def _number(row: Mapping[str, Any], names: Sequence[str], where: str) -> float:
    for name in names:
        if row.get(name) not in (None, ""):
            try:
                value = float(row[name])
            except (TypeError, ValueError):
                raise ValueError(f"{where}: {name}: {row[name]!r}; accepted: a number") from None
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{where}: {name}: {value}; accepted: a finite number that is not negative")
            return value
    raise ValueError(f"{where}: has none of {', '.join(names)}; accepted: a number under one of these names")


def of_results(results: Iterable[Result]) -> list[dict[str, Any]]:
    """The `trial` lines that did not diverge, as rows; a run that was written again counts once."""
    runs = {(r.study, r.arm, r.seed): dict(r.values) for r in results if r.kind == "trial"}
    return [values for values in runs.values() if values.get("loss_nats") is not None]


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """The runs of a folder that `assay laws run` or `assay study run` wrote, of its results.jsonl, of a CSV file with
    a header, or of JSON lines. ValueError with what is accepted."""
    path = Path(source)
    path = path / "results.jsonl" if path.is_dir() else path
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [dict(row) for row in csv.DictReader(file)]
    if path.suffix not in (".jsonl", ".ndjson"):
        raise ValueError(f"{path}: accepted: a folder with results.jsonl, a .jsonl file or a .csv file")
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        if path.name != "results.jsonl":
            raise ValueError(f"{path}: not JSON lines: {error}") from None
        rows = [{"kind": "trial"}]  # a torn last line, which Results allow for
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: accepted: one JSON object a line")
    return of_results(read_results(path)) if rows and "kind" in rows[0] else rows


def counts_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The ways of counting parameters that these rows allow and that differ from those before."""
    found: dict[str, list[float]] = {}
    for count in COUNTS:
        try:
            params = list(from_rows(rows, count).params)
        except ValueError:
            continue
        if params not in found.values():
            found[count] = params
    return tuple(found)
