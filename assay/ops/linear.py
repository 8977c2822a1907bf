"""The linear map of a few rows or many: one function, and whichever of the backends serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from assay.ops import onednn, packed
from assay.ops.native import Kernels, serving
from assay.ops.native.kernels import ROWS
from assay.ops.packed import Packed
from assay.ops.precision import multiplies_bfloat16

Map = tuple[Tensor, Tensor | None]


def linear(x: Float[Tensor, "*n K"], w: Float[Tensor, "N K"], b: Float[Tensor, "N"] | None = None) -> Tensor:
    """x w^T + b, [..., N]. In inference on a CPU, up to 64 rows take a compiled kernel with sums in float32, in which
    a row's result does not depend on the rows beside it; it differs from torch by the order of the sum alone. More
    rows of bfloat16 take another one, in float32, where the CPU has no product of bfloat16, and more of float32 the
    first under deterministic algorithms. Large products of float32 are oneDNN's on a CPU that MKL does not serve well,
    in training too. Packed weights: as `packed.linear`."""
    if type(w) is Packed:
        return packed.linear(x, w, b)
    native = serving(x)
    found = None if native is None else native.linear(x, w, b)
    if found is None:
        several = _many(native, x, [(w, b)])
        found = _whole(x, w, b) if several is None else several[0]
    return found


def _whole(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """torch's own product, or oneDNN's where that is the faster one."""
    return onednn.product(x, w, b) if onednn.serves(x, w, b) else F.linear(x, w, b)


def _many(native: Kernels | None, x: Tensor, maps: Sequence[Map]) -> list[Tensor] | None:
    """More rows than a few, where torch's product is not what is wanted: emulated bfloat16, and under deterministic
    algorithms float32, of which torch splits long sums by the number of threads."""
    if native is None:
        return None
    if x.dtype is torch.float32:
        return _in_pieces(native, x, maps) if torch.are_deterministic_algorithms_enabled() else None
    return None if multiplies_bfloat16() else native.many(x, maps)


def _in_pieces(native: Kernels, x: Tensor, maps: Sequence[Map]) -> list[Tensor] | None:
    """A few rows at a time, so that a row has the bits that it has alone."""
    found = [native.linears(piece, maps) for piece in x.reshape(-1, x.shape[-1]).contiguous().split(ROWS)]
    whole = [one for one in found if one is not None]
    if not whole or len(whole) != len(found):
        return None
    return [torch.cat(pieces).view(*x.shape[:-1], -1) for pieces in zip(*whole, strict=True)]


def linears(x: Float[Tensor, "*n K"], maps: Sequence[Map]) -> list[Tensor]:
    """The same x with several weights and biases. In inference on a CPU a few rows, and many of bfloat16, take one call
    of a compiled kernel for all of them, with the bits that each would have by itself."""
    low = [(w, b) for w, b in maps if type(w) is Packed]
    if len(low) == len(maps):
        return packed.linears(x, low)
    native = None if low else serving(x)
    found = None if native is None else native.linears(x, maps) or _many(native, x, maps)
    return [linear(x, w, b) for w, b in maps] if found is None else found
