"""Products of rows with matrices of their own: the experts of a mixture, or a matrix for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops import packed
from assay.ops.native import serving
from assay.ops.packed import Packed


class _ContiguousGrad(torch.autograd.Function):
    """Identity; the grouped kernel's backward refuses an expanded or strided gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def backend(x: Tensor, w: Tensor) -> str:
    """`kernel` where torch has one for this dtype and 16-byte rows; else `loop` (float64, odd sizes)."""
    aligned = all(size * x.element_size() % 16 == 0 for size in w.shape[1:])
    return "kernel" if x.dtype in (torch.float32, torch.bfloat16) and aligned and x.shape[0] > 0 else "loop"


def grouped(x: Float[Tensor, "M D"], w: Float[Tensor, "E F D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "M F"]:
    """Row i times w[e]^T, where e is the group of row i: the first counts[0] rows are group 0, and so on. Packed
    weights: as `packed.grouped`."""
    if type(w) is Packed:
        return packed.grouped(x, w, counts)
    offsets = counts.cumsum(0)
    if backend(x, w) == "kernel":
        out = torch._grouped_mm(x.contiguous(), w.transpose(1, 2), offs=offsets.to(torch.int32))
        return _ContiguousGrad.apply(out)
    rows = torch.arange(x.shape[0], device=x.device)
    total = x.new_zeros(x.shape[0], w.shape[1])
    for e in range(w.shape[0]):
        inside = (rows >= offsets[e] - counts[e]) & (rows < offsets[e])
        total = total + (x * inside[:, None]) @ w[e].T
    return total


def chosen(
    x: Float[Tensor, "*R D"], maps: Sequence[tuple[Tensor, Tensor | None]], choice: Int[Tensor, "N k"]
) -> list[Float[Tensor, "N k F"]] | None:
    """Of each map, a weight [E, F, D] and a bias [E, F] or None, what the experts that each row chose make of it: x is
    [N, D], or [N, k, D] with a row for each of the choices. None but in inference on a CPU, for as many rows as the
    compiled kernel takes (`Experts.chosen`), with weights that are not packed."""
    native = None if any(type(w) is Packed for w, _ in maps) else serving(x)
    return None if native is None else native.experts.chosen(x, maps, choice)


def heads(x: Float[Tensor, "N H K"], w: Float[Tensor, "H O K"]) -> Float[Tensor, "N H O"]:
    """Each head of x with its own matrix. A few rows in inference on a CPU take a compiled kernel, which reads w where
    it stands: row by row, also where it is the transpose of what is stored."""
    native, along = serving(x), w.stride(1) == 1 and w.stride(2) != 1
    found = None if native is None else native.experts.heads(x, w.mT if along else w, along)
    return torch.bmm(x.transpose(0, 1), w.mT).transpose(0, 1) if found is None else found
