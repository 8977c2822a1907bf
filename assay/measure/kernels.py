"""Attention backends beside the definition: seconds, bytes held, bytes moved, by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from assay.measure.machine import best
from assay.measure.subject import Subject
from assay.ops.attend import BACKENDS, Scores, attend, plan, tiled
from assay.ops.attend.call import Call
from assay.ops.sees import Sees
from assay.ops.state import step_layout
from assay.ops.step import Step, View, rows_step

ALONE = True
NAIVE = "naive"
DEFAULT = (NAIVE, "tiled", "matmul", "sdpa")


def measure(
    subject: Subject,
    *,
    lengths: Sequence[int] = (128, 256, 512, 1024),
    backends: Sequence[str] = DEFAULT,
    heads: int = 1,
    head_dim: int = 64,
    seconds: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows: backend, length, seconds, peak_bytes, traffic_bytes: causal attention forward on one sequence, in float32.

    naive writes scores and probabilities as softmax(q k^T) v reads. peak_bytes: the most that tensors made on the way
    hold at once, the result included (what happens inside one torch operator is not seen). traffic_bytes: moved
    between slow memory and tiles, counted for `naive` and `tiled`; null for others. `seconds` is for all rows.
    """
    rows = []
    for length in lengths:
        work = Work.of(length, heads, head_dim, subject.device)
        for backend in backends:
            run = work.runner(backend)
            with Held() as held:
                run()
            traffic = work.traffic(backend)
            took = best(run, subject.device, seconds / (len(lengths) * len(backends)))
            rows.append(
                {
                    "backend": backend,
                    "length": length,
                    "seconds": took,
                    "peak_bytes": held.peak,
                    "traffic_bytes": None if traffic is None else traffic * work.q.element_size(),
                }
            )
    return rows


class Work:
    """Queries, keys and values [N, H, K] of one sequence of N tokens."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q, self.k, self.v = q, k, v
        self.step: Step = rows_step(torch.zeros(1, q.shape[0], dtype=torch.long, device=q.device))
        self.scores, self.sees = Scores(q.shape[-1] ** -0.5), Sees()
        layout = step_layout(self.step)
        self.view = View({"k": k[None], "v": v[None]}, layout)

    @classmethod
    def of(cls, length: int, heads: int, head_dim: int, device: torch.device) -> Work:
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(length, heads, head_dim, generator=generator).to(device) for _ in range(3))
        return cls(q, k, v)

    def runner(self, backend: str) -> Callable[[], Tensor]:
        """The forward pass alone; what depends on the mask alone is made before."""
        if backend == NAIVE:
            hidden = torch.ones(len(self.q), len(self.q), dtype=torch.bool, device=self.q.device).triu(1)
            return lambda: self.naive(hidden)
        if backend not in BACKENDS:
            raise ValueError(f"kernels: backends: {backend!r}; accepted: {NAIVE}, {', '.join(BACKENDS)}")
        made = plan(self.step, self.view.layout, self.sees, backend)
        assert made.mask is None or made.causal
        return torch.no_grad()(lambda: attend(self.q, self.view, self.step, self.sees, self.scores, made))

    def naive(self, hidden: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (self.q, self.k, self.v))
        z = (q @ k.transpose(-1, -2) * self.scores.scale).masked_fill(hidden, float("-inf"))
        return (torch.softmax(z, -1) @ v).transpose(0, 1)

    def call(self) -> Call:
        q, k, v = self.q[None], self.k[None], self.v[None]
        made = plan(self.step, self.view.layout, self.sees, "tiled")
        return Call(q, k, v, self.step, self.view, self.sees, self.scores, made)

    def traffic(self, backend: str) -> int | None:
        """Elements read and written."""
        if backend == NAIVE:
            return tiled.naive_traffic(self.call()).total
        if backend != "tiled":
            return None
        counted = tiled.Traffic()
        tiled.run(self.call(), traffic=counted)
        return counted.total


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside `with`, as long as they live; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        self._before |= {_key(t) for t in given} - self._alive.keys()
        out = func(*args, **(kwargs or {}))
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._before:
                storage = tensor.untyped_storage()
                self._alive[_key(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
