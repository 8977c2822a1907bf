"""Attention backends beside the definition: seconds, bytes held, bytes moved, by length, and how they grow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from assay.measure.machine import best
from assay.measure.machine import seconds as once
from assay.measure.subject import Subject
from assay.ops.attend import BACKENDS, Scores, attend, plan, tiled
from assay.ops.attend.call import Call
from assay.ops.sees import Sees
from assay.ops.state import step_layout
from assay.ops.step import Step, View, rows_step

ALONE = True
NAIVE, TILED = "naive", "tiled"
DEFAULT = (NAIVE, TILED, "matmul", "sdpa")
LONG = 1024
"""From this length on the parts that do not grow are small, and slopes are fitted."""
Row = dict[str, Any]


def measure(
    subject: Subject,
    *,
    lengths: Sequence[int] = (128, 256, 512, 1024),
    backends: Sequence[str] = DEFAULT,
    heads: int = 1,
    head_dim: int = 64,
    backward: bool = False,
    seconds: float = 1.0,
) -> list[Row]:
    """Rows: backend, length, seconds, peak_bytes, traffic_bytes: causal attention forward on one sequence, in float32.

    backward: also train_seconds, train_peak_bytes, train_traffic_bytes, of forward and backward together. naive writes
    scores and probabilities as softmax(q k^T) v reads, and autograd keeps what it wants. peak_bytes: the most that
    tensors made on the way hold at once, the result included (what happens inside one torch operator is not seen).
    traffic_bytes: moved between slow memory and tiles, counted for `naive` and `tiled`; null for others. `seconds` is
    for all rows: what takes longer than its share runs once to be watched and once by the clock. See `slopes` for the
    rows at the end.
    """
    rows = []
    share = seconds / (len(lengths) * len(backends) * (1 + backward))
    for length in lengths:
        work = Work.of(length, heads, head_dim, subject.device)
        for backend in backends:
            row = {"backend": backend, "length": length} | work.cost(backend, False, share)
            if backward:
                row |= {f"train_{name}": value for name, value in work.cost(backend, True, share).items()}
            rows.append(row)
    return rows + slopes(rows)


def slopes(rows: Sequence[Row], least: int = LONG) -> list[Row]:
    """For each backend with two lengths >= `least` a row with the power of the length that its columns grow with there:
    `seconds_slope`, `peak_bytes_slope` and so on, by least squares on logarithms. The other columns are null, and
    `from_length` is the shortest length of the fit."""
    found = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend and row["length"] >= least]
        if len({row["length"] for row in mine}) < 2:
            continue
        columns = [name for name in mine[0] if name not in ("backend", "length")]
        fits = {f"{name}_slope": power(mine, name) for name in columns if mine[0][name] is not None}
        empty: Row = dict.fromkeys(("length", *columns))
        found.append({"backend": backend} | empty | {"from_length": min(row["length"] for row in mine)} | fits)
    return found


def power(rows: Sequence[Row], column: str) -> float:
    """p where `column` is about c * length^p."""
    x, y = ([math.log(row[name]) for row in rows] for name in ("length", column))
    return statistics.linear_regression(x, y).slope


class Work:
    """Queries, keys and values [N, H, K] of one sequence of N tokens, and what comes back to the output."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> None:
        self.given = tuple(t.requires_grad_() for t in (q, k, v))
        self.upstream = upstream
        self.step: Step = rows_step(torch.zeros(1, q.shape[0], dtype=torch.long, device=q.device))
        self.scores, self.sees = Scores(q.shape[-1] ** -0.5), Sees()
        self.layout = step_layout(self.step)

    @classmethod
    def of(cls, length: int, heads: int, head_dim: int, device: torch.device) -> Work:
        generator = torch.Generator().manual_seed(length)
        return cls(*(torch.randn(length, heads, head_dim, generator=generator).to(device) for _ in range(4)))

    def cost(self, backend: str, backward: bool, budget_s: float) -> Row:
        """seconds, peak_bytes and traffic_bytes of the forward pass, or of both passes."""
        counted = tiled.Traffic()
        forward = self.runner(backend, counted)
        run = (lambda: torch.autograd.grad(forward(), self.given, self.upstream)) if backward else forward
        with torch.set_grad_enabled(backward):
            with Held() as held:
                run()
            traffic = self.traffic(backend, backward, counted)
            return {
                "seconds": timed(run, self.upstream.device, budget_s),
                "peak_bytes": held.peak,
                "traffic_bytes": None if traffic is None else traffic * self.upstream.element_size(),
            }

    def runner(self, backend: str, counted: tiled.Traffic | None = None) -> Callable[[], Tensor]:
        """The forward pass; what depends on the mask alone is made before. `tiled` adds what it moves to `counted`."""
        if backend == NAIVE:
            length = len(self.upstream)
            hidden = torch.ones(length, length, dtype=torch.bool, device=self.upstream.device).triu(1)
            return lambda: self.naive(hidden)
        if backend not in BACKENDS:
            raise ValueError(f"kernels: backends: {backend!r}; accepted: {NAIVE}, {', '.join(BACKENDS)}")
        if backend == TILED:
            return lambda: tiled.run(self.call(), traffic=counted)[0][0]
        made = plan(self.step, self.layout, self.sees, backend)
        assert made.mask is None or made.causal
        return lambda: attend(self.given[0], self.view(), self.step, self.sees, self.scores, made)

    def naive(self, hidden: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in self.given)
        z = (q @ k.transpose(-1, -2) * self.scores.scale).masked_fill(hidden, float("-inf"))
        return (torch.softmax(z, -1) @ v).transpose(0, 1)

    def view(self) -> View:
        return View({"k": self.given[1][None], "v": self.given[2][None]}, self.layout)

    def call(self) -> Call:
        q, k, v = (t[None] for t in self.given)
        made = plan(self.step, self.layout, self.sees, TILED)
        return Call(q, k, v, self.step, self.view(), self.sees, self.scores, made)

    def traffic(self, backend: str, backward: bool, counted: tiled.Traffic) -> int | None:
        """Elements read and written; None where nobody counts."""
        if backend == NAIVE:
            return tiled.naive_traffic(self.call(), backward).total
        return counted.total if backend == TILED else None


def timed(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The shortest call: of one, if it takes longer than the budget, else of as many as fit."""
    first = once(run, device)
    return first if first >= budget_s else min(first, best(run, device, budget_s - first))


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside `with`, as long as they live; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._total = 0
        # A storage that somebody refers to weakly keeps its address, so that the keys stay unique.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, seconds of it, to keep it from compiling this

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fresh = [t for t in tensors((out,)) if _key(t) not in self._made]
        if fresh:
            given = [_key(t) for t in tensors((*args, *(kwargs or {}).values()))]
            for tensor in fresh:
                if _key(tensor) not in given:
                    self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._total += storage.nbytes()
        if self._total > self.peak:
            self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
            self._total = sum(size for _, size in self._made.values())
            self.peak = max(self.peak, self._total)


def tensors(items: Iterable[object]) -> list[Tensor]:
    """Those among the items and in their tuples and lists: torch's own walk takes longer than what is watched."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list):
            found += tensors(item)
    return found


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
