"""The linear map of a few rows or many: one function, and whichever of the backends serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from assay.ops import packed
from assay.ops.native import serving
from assay.ops.packed import Packed
from assay.ops.precision import multiplies_bfloat16

Map = tuple[Tensor, Tensor | None]
WIDENED = 1 << 22  # weights that are held in float32 at once


def linear(x: Float[Tensor, "*n K"], w: Float[Tensor, "N K"], b: Float[Tensor, "N"] | None = None) -> Tensor:
    """x w^T + b, [..., N]. In inference on a CPU, up to 64 rows take a compiled kernel with sums in float32, in which
    a row's result does not depend on the rows beside it; it differs from torch by the order of the sum alone. More
    rows of bfloat16 are multiplied in float32 where the CPU has no product of bfloat16. Packed weights: as
    `packed.linear`."""
    if type(w) is Packed:
        return packed.linear(x, w, b)
    native = serving(x)
    found = None if native is None else native.linear(x, w, b)
    if found is not None:
        return found
    wide = native is not None and x.dtype is w.dtype is torch.bfloat16 and not multiplies_bfloat16()
    return widened(x, w, b) if wide else F.linear(x, w, b)


def widened(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The product in float32, rounded once to x's dtype; w is widened piece by piece."""
    rows, y = x.float(), x.new_empty(*x.shape[:-1], w.shape[0])
    step = max(1, WIDENED // max(1, w.shape[1]))
    for i in range(0, w.shape[0], step):
        y[..., i : i + step] = F.linear(rows, w[i : i + step].float(), None if b is None else b[i : i + step].float())
    return y


def linears(x: Float[Tensor, "*n K"], maps: Sequence[Map]) -> list[Tensor]:
    """The same x with several weights and biases. A few rows in inference on a CPU take one call of a compiled kernel
    for all of them, with the bits that each would have by itself."""
    low = [(w, b) for w, b in maps if type(w) is Packed]
    if len(low) == len(maps):
        return packed.linears(x, low)
    native = None if low else serving(x)
    found = None if native is None else native.linears(x, maps)
    return [linear(x, w, b) for w, b in maps] if found is None else found
