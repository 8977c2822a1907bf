"""One query a sequence over keys and values in their pages, on a GPU.

As `native/attend.h` on a CPU: the keys are cut into pieces of a fixed length that are merged at the end (Dao et al.
2023, Flash-Decoding), so that a query's bits depend neither on the rows beside it nor on the length of the view, and
the pages are followed through their table (Kwon et al. 2023, arXiv 2309.06180). Run in Triton's interpreter and
compiled for sm_90 in the tests, not on hardware.

Legend: N rows, H query heads, G key heads of R = H / G queries, S entries of a view, P pieces, K and V head sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 128  # entries of a piece: fixed, so that the order of a sum never changes
LEAST = 16  # rows and columns of the smallest tile that a GPU multiplies
WIDEST = 256  # dimensions of a head: more would not fit the registers
INTERPRETED = bool(triton.knobs.runtime.interpret)  # in which there are no products of bfloat16


class Pool(NamedTuple):
    """Queries [N, H, K], or keys or values in pages [_, page, G, K]: the first number, and the strides of all axes but
    the last."""

    base: Any
    row: int
    entry: int
    head: int


class Where(NamedTuple):
    """The pages [N, S / page] of every row, their length, and which entries count, [N, S]; strides of rows."""

    table: Any
    table_row: int
    page: int
    seen: Any
    seen_row: int
    entries: int


class Rule(NamedTuple):
    scale: float
    softcap: float


class Parts(NamedTuple):
    """Of each piece and head: the largest logit and the sum of e^(z - top) [N, P, H], and the values [N, P, H, V] in
    those shares."""

    top: Any
    total: Any
    mixed: Any


class Sizes(NamedTuple):
    """What a kernel is compiled for. wide_*: the next power of two."""

    heads: int
    groups: int
    size: int
    width: int
    wide_shared: int
    wide_size: int
    wide_width: int
    piece: int
    capped: bool
    widened: bool


@triton.jit
@no_type_check
def piece_kernel(q, k, v, where, rule, parts, SIZES: tl.constexpr):
    """The heads of one group with one piece of a row's entries."""
    row, piece, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    SHARED: tl.constexpr = SIZES.heads // SIZES.groups
    heads, inside = tl.arange(0, SIZES.wide_shared), tl.arange(0, SIZES.piece)
    dims, values = tl.arange(0, SIZES.wide_size), tl.arange(0, SIZES.wide_width)
    entry = piece * SIZES.piece + inside
    exists = entry < where.entries
    seen = tl.load(where.seen + row * where.seen_row + entry, mask=exists, other=0) != 0
    page = tl.load(where.table + row * where.table_row + entry // where.page, mask=exists, other=0)
    head, real = group * SHARED + heads, heads < SHARED
    at = ((row * tl.num_programs(1) + piece) * SIZES.heads + head).to(tl.int64)
    # Entries that nobody sees are not read, which is what makes a window cheap.
    queries = tl.load(
        q.base + row * q.row + head[:, None] * q.head + dims,
        mask=real[:, None] & (dims < SIZES.size),
        other=0.0,
    )
    place = page * k.row + (entry % where.page) * k.entry + group * k.head
    keys = tl.load(k.base + place[None, :] + dims[:, None], mask=seen & (dims < SIZES.size)[:, None], other=0.0)
    if SIZES.widened:
        queries, keys = queries.to(tl.float32), keys.to(tl.float32)
    z = tl.dot(queries, keys, input_precision="tf32x3") * rule.scale
    if SIZES.capped:
        z = rule.softcap * (2.0 * tl.sigmoid(2.0 * z / rule.softcap) - 1.0)
    z = tl.where(seen, z, float("-inf"))
    top = tl.max(z, 1)
    share = tl.where(seen, tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[:, None]), 0.0)
    tl.store(parts.top + at, top, mask=real)
    tl.store(parts.total + at, tl.sum(share, 1), mask=real)
    place = page * v.row + (entry % where.page) * v.entry + group * v.head
    held = tl.load(v.base + place[:, None] + values, mask=seen[:, None] & (values < SIZES.width), other=0.0)
    mixed = tl.dot(share, held.to(tl.float32), input_precision="tf32x3")
    to = parts.mixed + at[:, None] * SIZES.width + values
    tl.store(to, mixed, mask=real[:, None] & (values < SIZES.width))


@triton.jit
@no_type_check
def merge_kernel(parts, y, sink, pieces, SIZES: tl.constexpr, SUNK: tl.constexpr):
    """The pieces of one row and head, from the first to the last; nothing seen gives zeros."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values = tl.arange(0, SIZES.wide_width)
    top, total = float("-inf"), 0.0
    if SUNK:
        top = tl.load(sink + head)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    mixed = tl.zeros([SIZES.wide_width], tl.float32)
    for piece in range(pieces):
        at = (row * pieces + piece) * SIZES.heads + head
        own = tl.load(parts.top + at)
        new = tl.maximum(top, own, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(new == float("-inf"), 0.0, new)
        before, now = tl.exp(top - shift), tl.exp(own - shift)
        total = total * before + now * tl.load(parts.total + at)
        held = tl.load(parts.mixed + at * SIZES.width + values, mask=values < SIZES.width, other=0.0)
        mixed = mixed * before + now * held
        top = new
    out = tl.where(total == 0.0, 0.0, mixed / tl.where(total == 0.0, 1.0, total))
    to = y + (row * SIZES.heads + head) * SIZES.width + values
    tl.store(to, out.to(y.dtype.element_ty), mask=values < SIZES.width)


def attend(
    q: Tensor,
    stored: tuple[Tensor, Tensor],
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor | None:
    """`Kernels.attend` of the CPU: softmax(scores) v for q [N, H, K], one query a sequence, over `stored` k
    [N, S, G, K] and v [N, S, G, V], or pages [_, S / P, G, .] of which row n has those of table[n]. None where it does
    not serve."""
    (rows, heads, size), (k, v), entries = q.shape, stored, seen.shape[1]
    page, groups, width = k.shape[1], k.shape[2], v.shape[3]
    if not rows or not entries or heads % groups or max(size, width) > WIDEST or not q.dtype == k.dtype == v.dtype:
        return None
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if not q.stride(2) == k.stride(3) == v.stride(3) == seen.stride(1) == 1:
        return None
    table = torch.arange(rows, device=q.device)[:, None] if table is None else table
    assert entries == page * table.shape[1] and table.stride(1) == 1
    pieces = triton.cdiv(entries, PIECE)
    sizes = _sizes(heads, groups, size, width, softcap is not None)
    parts = Parts(*(q.new_empty(rows, pieces, heads, *more, dtype=torch.float32) for more in ((), (), (width,))))
    where = Where(table, table.stride(0), page, seen.view(torch.uint8), seen.stride(0), entries)
    pools = (Pool(q, q.stride(0), 0, q.stride(1)), *(Pool(t, *t.stride()[:3]) for t in stored))
    piece_kernel[rows, pieces, groups](*pools, where, Rule(scale, softcap or 0.0), parts, SIZES=sizes)
    y = q.new_empty(rows, heads, width)
    given = y if sink is None else sink.float().contiguous()
    merge_kernel[rows, heads](parts, y, given, pieces, SIZES=sizes, SUNK=sink is not None)
    return y


def _sizes(heads: int, groups: int, size: int, width: int, capped: bool) -> Sizes:
    shared, wide_size, wide_width = (max(LEAST, triton.next_power_of_2(n)) for n in (heads // groups, size, width))
    return Sizes(heads, groups, size, width, shared, wide_size, wide_width, PIECE, capped, INTERPRETED)
