"""Rows rounded to 8 bits, times weights of 8 or 4 bits, on a GPU. `assay/ops/packed.py` says how both are held.

Sums inside a group are of integers, hence exact; groups are added in their order by fused multiply-adds, as on a CPU.
Run in Triton's interpreter, which rounds a fused multiply-add twice, and compiled for sm_90 in the tests; not on
hardware.

Legend: M rows of K inputs in G groups of 32, N outputs in tiles of 16, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from assay.ops.packed import Packed

TYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = 8  # groups that are rounded by one program
LEAST, MOST = 16, 64  # rows of x that are multiplied at once
ALONE = 64  # beyond this many rows, each with the matrix of its expert, torch does it


class Rounded(NamedTuple):
    """Whole numbers of -127 to 127 [M, G, 32] and the scales of their groups [M, G]."""

    whole: Any
    scale: Any
    rows: int
    groups: int


class Map(NamedTuple):
    """A packed weight [E, T, bytes], read as bytes and as the scales that each tile begins with; its bias; the result
    [M, N]; and the number of the row behind each expert's last, [E]."""

    codes: Any
    scales: Any
    bias: Any
    y: Any
    out: int
    tile_bytes: int
    ends: Any


class Sizes(NamedTuple):
    """What a kernel is compiled for. experts: 0 where all rows have the same matrix."""

    bits: int
    rows: int
    biased: bool
    experts: int


@triton.jit
@no_type_check
def round_kernel(x, row_stride, size, rounded, GROUPS: tl.constexpr):
    """The groups of one row. One that is not finite gets NaN for its scale, and one below 2^-119, whose inverse is not,
    gets 0."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 32 + tl.arange(0, 32)
    v = tl.load(x + row * row_stride + at, mask=at < size, other=0.0).to(tl.float32)
    # The bits of an absolute value are ordered as the values are, and those of a NaN stand above infinity's.
    top = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = top < 0x7F800000
    most = tl.where(top < 0x04000000, 0, top).to(tl.float32, bitcast=True)
    counts = finite & (most > 0.0)
    full, bias = tl.full([GROUPS], 127.0, tl.float32), tl.full([GROUPS, 32], 12582912.0, tl.float32)
    share = tl.where(counts, tl.div_rn(full, tl.where(counts, most, 1.0)), 0.0)
    near = tl.fma(tl.where(counts[:, None], v, 0.0), tl.broadcast_to(share[:, None], [GROUPS, 32]), bias)
    whole = near.to(tl.int32, bitcast=True) - 0x4B400000  # 1.5 * 2^23: the sum is rounded to a whole number
    scale = tl.where(finite, tl.div_rn(most, full), float("nan"))
    real = group < rounded.groups
    tl.store(rounded.whole + row * rounded.groups * 32 + at, whole.to(tl.int8), mask=real[:, None])
    tl.store(rounded.scale + row * rounded.groups + group, scale, mask=real)


@triton.jit
@no_type_check
def packed_kernel(r, map, SIZES: tl.constexpr):
    """One tile of 16 outputs, for some of the rows or, among experts, for one."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    STEP: tl.constexpr = 1 if SIZES.experts else SIZES.rows
    row = block * STEP + tl.arange(0, SIZES.rows)
    real = row < tl.minimum((block + 1) * STEP, r.rows)
    place = tile
    if SIZES.experts:
        expert = 0
        for e in range(SIZES.experts):
            expert += (tl.load(map.ends + e) <= block).to(tl.int32)
        place = tile + expert * tl.num_programs(0)
    codes = map.codes + place * map.tile_bytes + (r.groups * 32 + 63) // 64 * 64
    scales = map.scales + place * (map.tile_bytes // 2)
    lane, inside = tl.arange(0, 16), tl.arange(0, 32)
    total = tl.zeros([SIZES.rows, 16], tl.float32)
    for g in range(r.groups):
        at = (row[:, None] * r.groups + g) * 32 + inside
        x = tl.load(r.whole + at, mask=real[:, None], other=0)
        u = tl.load(codes + g * SIZES.bits * 64 + tl.arange(0, SIZES.bits * 64))
        if SIZES.bits == 8:
            w = tl.permute(tl.reshape(u.to(tl.int16) - 128, (8, 16, 4)), (0, 2, 1))
        else:
            both = tl.join((u & 15).to(tl.int16), (u >> 4).to(tl.int16)) - 8
            w = tl.permute(tl.reshape(both, (4, 16, 4, 2)), (3, 0, 2, 1))
        sums = tl.dot(x, tl.reshape(w, (32, 16)).to(tl.int8), out_dtype=tl.int32)
        mine = tl.load(r.scale + row * r.groups + g, mask=real, other=0.0)
        theirs = tl.load(scales + g * 16 + lane).to(tl.float32)
        total = tl.fma(sums.to(tl.float32), mine[:, None] * theirs, total)
    column = tile * 16 + lane
    kept = real[:, None] & (column < map.out)
    if SIZES.biased:
        total += tl.load(map.bias + column, mask=column < map.out, other=0.0).to(tl.float32)
    tl.store(map.y + row[:, None] * map.out.to(tl.int64) + column, total.to(map.y.dtype.element_ty), mask=kept)


def rounded(x: Tensor) -> Rounded:
    """Rows [M, K] in whole numbers."""
    (rows, size), groups = x.shape, triton.cdiv(x.shape[1], 32)
    whole, scale = x.new_empty(rows, groups, 32, dtype=torch.int8), x.new_empty(rows, groups, dtype=torch.float32)
    found = Rounded(whole, scale, rows, groups)
    round_kernel[rows, triton.cdiv(groups, GROUPS)](x, x.stride(0), size, found, GROUPS=GROUPS)
    return found


def packed(x: Tensor, maps: Sequence[tuple[Packed, Tensor | None]]) -> list[Tensor] | None:
    """`Kernels.packed` of the CPU: x [..., K] of any number of rows with each of these weights and biases; x is rounded
    once for all. None where it does not serve."""
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype not in TYPES or not rows.numel() or any(b is not None and not b.is_contiguous() for _, b in maps):
        return None
    r = rounded(rows if rows.stride(1) == 1 else rows.contiguous())
    found = [_multiplied(r, w, b, x.dtype) for w, b in maps]
    return [y.view(*x.shape[:-1], w.out) for y, (w, _) in zip(found, maps, strict=True)]


def grouped(x: Tensor, w: Packed, counts: Tensor) -> Tensor | None:
    """`Kernels.grouped` of the CPU: rows x [M, K] sorted by expert, counts[e] of them for each, with the weights
    [E, N, K] of theirs. None for more than 64 rows."""
    if x.dtype not in TYPES or not x.numel() or x.shape[0] > ALONE:
        return None
    return _multiplied(rounded(x.contiguous()), w, None, x.dtype, counts.cumsum(0))


def _multiplied(r: Rounded, w: Packed, b: Tensor | None, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
    codes, y = w.codes, w.codes.new_empty(r.rows, w.out, dtype=dtype)
    rows = LEAST if ends is not None else min(MOST, max(LEAST, triton.next_power_of_2(r.rows)))
    sizes = Sizes(w.bits, rows, b is not None, 0 if ends is None else len(ends))
    numbers = (w.out, codes.shape[1], codes if ends is None else ends)
    given = Map(codes, codes.view(torch.bfloat16), y if b is None else b, y, *numbers)
    blocks = triton.cdiv(r.rows, rows) if ends is None else r.rows
    packed_kernel[triton.cdiv(w.out, 16), blocks](r, given, SIZES=sizes)
    return y
