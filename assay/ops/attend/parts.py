"""Which queries meet which keys, where a rule leaves most of the square out: groups of queries, each with the keys that
somebody in it sees. Found from the places of both, without the square.

Legend: R x T rows and columns of the grid, S entries of the view; g groups of t queries and s keys in a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from assay.ops.sees import Sees

Places = NDArray[np.int64]
FAR = np.iinfo(np.int64).max
GROUP = 128
# A part holds about this many pairs a row and head, so that its logits stay in cache, and is at most this much padding.
PAIRS, PADDED = 1 << 17, 1.25
# What is worth gathering: squares of at least so many pairs, of which at most one in `SHARE` is multiplied. A span
# without holes is cut out of the square by `matmul` as well, whose mask costs more than its products from `SPAN` on.
# One query alone is left to the kernel that decodes: it reads all keys in less time than it takes to find some.
SMALLEST, SHARE, SPAN = 1 << 20, 6, 1 << 24


@dataclass(frozen=True)
class Part:
    """Queries q, by their columns, with keys k; a query stands in a part once. mask: one row if all rows agree; None:
    everybody sees everything. Padding is the query T, of whom nothing is read, and a key that is masked."""

    q: Int[Tensor, "g t"]
    k: Int[Tensor, "g s"]
    mask: Bool[Tensor, "_ g t s"] | None

    @property
    def pairs(self) -> int:
        return self.q.numel() * self.k.shape[1]


@dataclass(frozen=True)
class Group:
    """Columns of queries, and of the keys that somebody among them may see; far: of those behind the window only."""

    q: Places
    k: Places
    far: bool


@dataclass(frozen=True)
class Where:
    """Sequence and place of the queries [R, T] and of the entries [R, S], on the host."""

    q_seq: Places
    q_index: Places
    k_seq: Places
    k_index: Places

    @classmethod
    def alone(cls, new: int, past: int) -> Where:
        """One sequence that brings `new` tokens after `past` others."""
        q, k = np.arange(past, past + new)[None], np.arange(past + new)[None]
        return cls(np.zeros_like(q), q, np.zeros_like(k), k)

    def once(self) -> Where:
        """One row where all rows agree: each is one sequence, and the same places hold its tokens."""
        own = self.q_seq[:, :1]
        here = self.k_seq == own
        alike = all((x == x[:1]).all() for x in (self.q_index, self.k_index, here))
        if not alike or (self.q_seq != own).any() or (own < 0).any():
            return self
        return Where(self.q_seq[:1] * 0, self.q_index[:1], np.where(here[:1], 0, -1), self.k_index[:1])

    @cached_property
    def plain(self) -> bool:
        """One row of one sequence, whose entries stand in their order from the first on."""
        one = len(self.q_seq) == 1 and (self.q_seq == self.q_seq[0, 0]).all() and (self.k_seq == self.q_seq[0, 0]).all()
        return bool(one and np.array_equal(self.k_index[0], np.arange(self.k_index.shape[1])))

    def classes(self, stride: int) -> tuple[Places, Places] | None:
        """Numbers of the queries' and the entries' columns that are the same where one may see the other at a distance
        of whole strides; None where rows disagree about them."""
        if len(self.q_seq) == 1:
            return self.q_seq[0] * stride + self.q_index[0] % stride, self.k_seq[0] * stride + self.k_index[0] % stride
        going_on = (np.diff(self.k_index) == 1) | (np.diff(self.k_seq) != 0)
        if not np.array_equal(self.q_index, self.k_index) or not going_on.all():
            return None
        columns = np.arange(self.q_index.shape[1]) % stride
        return columns, columns


def groups(sees: Sees, where: Where) -> list[Group] | None:
    """All that a rule without a prefix shows: each visible pair is in exactly one. None where there is no such list."""
    columns = np.arange(where.q_index.shape[1])
    whole = (where.q_index < (0 if sees.band is None else sees.first)).any(0)
    found = [Group(q, _near(sees, where, q), False) for side in (columns[whole], columns[~whole]) for q in _cut(side)]
    if sees.stride is not None:
        classes = where.classes(sees.stride)
        if classes is None:
            return None
        found += _far(sees, where, *classes)
    return [group for group in found if len(group.k)]


def _cut(columns: Places) -> Iterator[Places]:
    return (columns[i : i + GROUP] for i in range(0, len(columns), GROUP))


def _near(sees: Sees, where: Where, q: Places) -> Places:
    """The columns of the keys in the spans of these queries, and of those below that `first` and `last` show."""
    k, seq, index = where.k_index, where.q_seq[:, q], where.q_index[:, q]
    low, high = sees.spans(index, int(k.max(initial=-1)) + 1)
    low, seq_low = (np.where(seq >= 0, x, FAR).min(1, keepdims=True) for x in (low, seq))
    high, seq_high = (np.where(seq >= 0, x, -1).max(1, keepdims=True) for x in (high, seq))
    if where.plain:
        return _columns(sees, max(0, int(low[0, 0])), min(int(high[0, 0]) + 1, k.shape[1]))
    inside = k >= low
    if sees.first:
        inside |= k < sees.first
    if sees.last and sees.chunk is not None:
        inside |= k % sees.chunk >= sees.chunk - sees.last
    inside &= (k <= high) & (where.k_seq >= seq_low) & (where.k_seq <= seq_high)
    return np.flatnonzero(inside.any(0))


def _columns(sees: Sees, low: int, high: int) -> Places:
    """The places from low to below high, and those below that `first` and `last` show."""
    below = [np.arange(min(sees.first, low))]
    if sees.last and sees.chunk is not None:
        ends = np.arange(-(-low // sees.chunk))[:, None] * sees.chunk + np.arange(sees.chunk - sees.last, sees.chunk)
        below.append(ends[ends < low])
    return np.concatenate([*below, np.arange(low, high)])


def _far(sees: Sees, where: Where, q_class: Places, k_class: Places) -> Iterator[Group]:
    """Queries and keys whose distance is whole strides, and more than the window."""
    assert sees.window is not None
    q_order, k_order = np.argsort(q_class, kind="stable"), np.argsort(k_class, kind="stable")
    q_sorted, k_sorted = q_class[q_order], k_class[k_order]
    starts = np.flatnonzero(np.diff(q_sorted, prepend=q_sorted[:1] - 1))
    for q in np.split(q_order, starts[1:]):
        number = q_class[q[0]]
        keys = k_order[np.searchsorted(k_sorted, number) : np.searchsorted(k_sorted, number, "right")]
        for part in _cut(q):
            behind = where.k_index[:, keys] <= where.q_index[:, part].max(1, keepdims=True) - sees.window
            yield Group(part, keys[(behind & (where.k_seq[:, keys] >= 0)).any(0)], True)


def batches(found: Sequence[Group], rows: int) -> Iterator[list[Group]]:
    """Groups of like sizes, to be padded to the largest: as many as make a part."""
    batch: list[Group] = []
    for group in sorted(found, key=lambda g: (g.far, len(g.q), len(g.k))):
        more = [*batch, group]
        padded, real = padded_pairs(more), sum(len(g.q) * len(g.k) for g in more)
        if batch and (rows * padded > PAIRS or padded > PADDED * real or batch[0].far != group.far):
            yield batch
            more = [group]
        batch = more
    if batch:
        yield batch


def padded_pairs(batch: Sequence[Group]) -> int:
    return len(batch) * max(len(g.q) for g in batch) * max(len(g.k) for g in batch)


def multiplied(found: Sequence[Group], rows: int) -> int:
    """(query, key) pairs of the parts made of these, in each of the rows."""
    return sum(padded_pairs(batch) for batch in batches(found, rows))


def worth(sees: Sees, where: Where) -> list[Group] | None:
    """The groups of a rule that leaves enough out of a large enough square; None where the square is cheaper."""
    tokens, entries = where.q_index.shape[1], where.k_index.shape[1]
    pairs, holes = tokens * entries, sees.scattered or sees.first > 0
    if sees.everything or tokens == 1 or pairs < (SMALLEST if holes else max(SMALLEST, SPAN)):
        return None
    found = groups(sees, where)
    return found if found is not None and multiplied(found, len(where.q_seq)) * SHARE <= pairs else None


@lru_cache(maxsize=256)  # the layers of a model ask the same question
def gathered_pairs(new: int, past: int, sees: Sees) -> int | None:
    """(query, key) pairs multiplied for one sequence that brings `new` tokens after `past` others; None: the square is
    cheaper."""
    found = worth(sees, Where.alone(new, past))
    return None if found is None else multiplied(found, 1)


def parts(sees: Sees, where: Where, found: Sequence[Group]) -> tuple[Part, ...]:
    """The groups as tensors, with what their queries see."""
    return tuple(_part(sees, where, batch) for batch in batches(found, len(where.q_seq)))


def _part(sees: Sees, where: Where, batch: Sequence[Group]) -> Part:
    tokens, sizes = where.q_index.shape[1], (max(len(g.q) for g in batch), max(len(g.k) for g in batch))
    q, k = np.full((len(batch), sizes[0]), tokens), np.full((len(batch), sizes[1]), -1)
    for i, group in enumerate(batch):
        q[i, : len(group.q)], k[i, : len(group.k)] = group.q, group.k
    read = np.minimum(q, tokens - 1)
    q_index, k_index = where.q_index[:, read][..., None], where.k_index[:, k][:, :, None]
    mask = (where.q_seq[:, read][..., None] == where.k_seq[:, k][:, :, None]) & (q_index >= 0)
    mask &= (q < tokens)[..., None] & (k >= 0)[:, None] & (where.k_seq[:, k] >= 0)[:, :, None]
    if sees.stride is None:
        mask &= sees.visible(q_index, k_index)
    elif batch[0].far:
        assert sees.window is not None
        mask &= (k_index <= q_index - sees.window) & ((q_index - k_index) % sees.stride == 0)
    else:
        mask &= Sees(window=sees.window).visible(q_index, k_index)
    every = bool(mask.all())
    return Part(torch.from_numpy(q), torch.from_numpy(np.maximum(k, 0)), None if every else torch.from_numpy(mask))
