"""The time of a decode step as a fixed part, a part a sequence and a part a byte of state that is read.

t = a + b * batch + c * batch * context * state_bytes_per_token (Shazeer 2019, arXiv 1911.02150, section 2.4: decoding
loads the keys and values again for each token; Pope et al. 2022, arXiv 2211.05102, section 2: weights are loaded once a
step, the state of every sequence besides).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from assay.cache import Size, predict
from assay.engine.runner import CHUNK, Runner
from assay.measure.machine import memory_byte_s
from assay.measure.machine import seconds as clocked
from assay.measure.serving import Load, Serving, in_turns, warmed
from assay.measure.subject import Subject
from assay.model.lm import LM, state_table

ALONE = True
SUMMARY = ("r2", "worst_error", "spread", "seconds_fixed", "seconds_per_sequence", "seconds_per_cached_token")
RATES = ("state_byte_s", "memory_byte_s")


@dataclass(frozen=True)
class Fit:
    """fixed, a [s]; sequence, b [s]; byte, c [s/byte]; fitted [s], of each cell; r2, in relative errors."""

    fixed: float
    sequence: float
    byte: float
    fitted: tuple[float, ...]
    r2: float


def fit(batches: Sequence[int], state_bytes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Least squares of relative errors (weights 1 / seconds). state_bytes: of all sequences of a cell together.

    r2: the share of the weighted spread between cells that is explained, 1 - sum((t - fitted)² / t²) over
    sum((t - m)² / t²), where the constant m makes the latter least. ValueError for cells that leave a number open.
    """
    times = np.asarray(seconds, float)
    columns = np.stack([np.ones(len(times)), np.asarray(batches, float), np.asarray(state_bytes, float)], 1)
    scale = np.maximum(columns.max(0, initial=0.0), 1.0)  # bytes and ones in one matrix would be badly conditioned
    if len(times) < 4 or np.linalg.matrix_rank(columns / scale) < 3:
        raise ValueError(
            f"{len(times)} cells do not tell a fixed time, a time a sequence and a time a byte of state apart; "
            "accepted: four or more, with two batches and two contexts between which the state of a sequence grows"
        )
    found = np.linalg.lstsq(columns / scale / times[:, None], np.ones(len(times)), rcond=None)[0] / scale
    fitted = columns @ found
    mean = np.average(times, weights=times**-2)
    missed, spread = np.sum((1 - fitted / times) ** 2), np.sum((1 - mean / times) ** 2)
    r2 = float(1 - missed / spread) if spread > 0 else 0.0
    fixed, sequence, byte = (float(x) for x in found)
    return Fit(fixed, sequence, byte, tuple(float(x) for x in fitted), r2)


class Step:
    """One decode step, repeated: each sequence of the batch gets its token number `context`, and forgets it again.

    The rest is one prompt, read once and copied to every row, since reading `batch` of them would take most of the
    time; the last tokens differ, so that a router sees different ones.
    """

    def __init__(self, model: LM, batch: int, context: int) -> None:
        self.serving, self.context = Serving(model, Load(batch, context, 1)), context
        prompt, self.last = self.serving.ids[0, :-1].tolist(), self.serving.ids[:, -1:].tolist()
        # Room to go one token back: a second saved state, and a place more than a window shows.
        self.runner = Runner(model, Size(batch, context, max(2, min(CHUNK, context)), saves=2))
        self.slots = [self.runner.open(context)]
        self.runner.feed(self.slots, [prompt])
        for _ in range(batch - 1):
            self.slots.append(self.runner.cache.fork(self.slots[0]))
            self.runner.horizons[self.slots[-1]] = context

    def seconds(self) -> float:
        took = clocked(lambda: self.serving.choose(self.runner.feed(self.slots, self.last)), self.serving.device)
        for slot in self.slots:
            self.runner.cache.rewind(slot, self.context - 1)
        return took

    def burst(self) -> list[float]:
        return warmed(self.seconds)


def measure(
    subject: Subject,
    *,
    batches: Sequence[int] = (1, 8, 32),
    contexts: Sequence[int] = (128, 512, 2048),
    seconds: float = 6.0,
) -> list[dict[str, Any]]:
    """Rows: one a cell (cell, batch, context, state_bytes, seconds, fitted_s), then one with `cell: fit` (cells, r2,
    worst_error, spread, seconds_fixed, seconds_per_sequence, seconds_per_cached_token, state_byte_s, memory_byte_s).

    seconds: the median time of one decode step, greedy sampling included, that gives each of `batch` sequences its
    token number `context`; positions need not be trained for that, only exist. Cells take turns; the option bounds the
    time of everything, but for reading the prompts and five steps a cell. The state of all cells exists at once.

    seconds_per_cached_token: what a token that every layer keeps adds to a step. state_byte_s: 1 / c, the bytes of
    state a second that the growth implies, null where the times do not grow; memory_byte_s: what reading that many
    bytes (the largest cell's) reaches. State is what the model declares: of a window, the tokens it shows, while a
    machine reads some more. A number below zero is one that the times do not resolve.

    r2 says something where there are clearly more cells than the three numbers and `spread`, the slowest cell over the
    quickest, is well above the noise, say 2: where overhead is all there is, it compares noise with noise and is low
    though the model may hold. worst_error is the largest relative error of a cell, and says how good the fit is by
    itself. A small model (64 wide) on a CPU reads its weights in microseconds: its fixed time is that of starting
    operations, its time a sequence is bookkeeping and sampling, and state_byte_s is the rate of attention's arithmetic
    and of copies as much as that of memory. Where those copies grow past what the allocator keeps (tens of MiB), each
    step faults its pages in anew and the largest cells stand above the line: worst_error shows it.
    """
    check(batches, contexts, seconds)
    end = time.perf_counter() + seconds
    name = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    fields = state_table(subject.spec)
    rows: list[dict[str, Any]] = []
    for batch, context in ((b, c) for b in dict.fromkeys(batches) for c in dict.fromkeys(contexts)):
        kept = predict(fields, Size(batch, context), name).stored
        row = {"cell": f"{batch} x {context}", "batch": batch, "context": context, "state_bytes": kept}
        reason = subject.refusal(context)
        rows.append(row | ({"seconds": None, "fitted_s": None, "reason": reason} if reason is not None else {}))
    open_rows = [row for row in rows if "reason" not in row]
    steps = [Step(subject.model, row["batch"], row["context"]) for row in open_rows]
    found = in_turns([step.burst for step in steps], end - time.perf_counter())
    for row, times in zip(open_rows, found, strict=True):
        row["seconds"] = median(times)
    per_token = predict(fields, Size(1, 2), name).stored - predict(fields, Size(1, 1), name).stored
    return [*rows, summary(open_rows, per_token, subject)]


def check(batches: Sequence[int], contexts: Sequence[int], seconds: float) -> None:
    """ValueError for options that leave nothing to fit."""
    if seconds <= 0:
        raise ValueError(f"decode_fit: seconds: {seconds}; accepted: above 0")
    for name, values, least in (("batches", batches, 1), ("contexts", contexts, 2)):
        if len(set(values)) < 2 or min(values) < least:
            raise ValueError(f"decode_fit: {name}: {list(values)}; accepted: two or more sizes of at least {least}")


def summary(rows: list[dict[str, Any]], per_token: int, subject: Subject) -> dict[str, Any]:
    """The row of the fit, and `fitted_s` into the rows of the cells. per_token: bytes that a cached token takes."""
    made: dict[str, Any] = {"cell": "fit", "cells": len(rows)}
    times, kept = [row["seconds"] for row in rows], [row["state_bytes"] for row in rows]
    try:
        line = fit([row["batch"] for row in rows], kept, times)
    except ValueError as error:
        for row in rows:
            row["fitted_s"] = None
        return made | dict.fromkeys(SUMMARY + RATES) | {"reason": str(error)}
    for row, fitted in zip(rows, line.fitted, strict=True):
        row["fitted_s"] = fitted
    worst = max(abs(fitted / t - 1) for fitted, t in zip(line.fitted, times, strict=True))
    values = (line.r2, worst, max(times) / min(times), line.fixed, line.sequence, line.byte * per_token)
    rates = (1 / line.byte if line.byte > 0 else None, memory_byte_s(max(kept), subject.device))
    return made | dict(zip(SUMMARY + RATES, values + rates, strict=True))
