"""Packing without padding: documents one after another, cut into rows, and nothing attends across a border.

A row is T + 1 tokens: the first T are inputs, the last T what follows each. Rows overlap by that one token, so
every token is an input once, and a target once unless it opens a document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from assay.data.draws import permutation
from assay.data.shards import Shard

Packing = Literal["concatenate", "best_fit"]

IGNORED = -1
"""The target of a token that nothing has to be predicted from."""


@dataclass(frozen=True)
class Rows:
    """R rows: tokens [R, T+1]; opens [R, T+1], where a document begins; counted [R, T+1], what is to be predicted."""

    tokens: NDArray[np.int64]
    opens: NDArray[np.bool_]
    counted: NDArray[np.bool_]

    @classmethod
    def stack(cls, rows: list[Rows]) -> Rows:
        columns = ([getattr(row, name) for row in rows] for name in ("tokens", "opens", "counted"))
        return cls(*(np.concatenate(column) for column in columns))


class Rowed(Protocol):
    """Rows for ever, each a function of its number. rows: about how many it takes to see every document once. key: what
    sets it apart from others over the same documents."""

    @property
    def rows(self) -> int: ...

    @property
    def key(self) -> str: ...

    def row(self, number: int) -> Rows: ...


class Concatenation:
    """The documents of a shard in a given order, read as one long text."""

    def __init__(self, shard: Shard, order: NDArray[np.int64]) -> None:
        self.shard = shard
        self.order = order
        lengths = np.diff(shard.offsets)[order]
        self.borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def read(self, start: int, stop: int) -> Rows:
        """Tokens start .. stop-1, as one row. Within the text only."""
        first, last = (int(i) for i in np.searchsorted(self.borders, [start, stop - 1], side="right") - 1)
        pieces = []
        for i in range(first, last + 1):
            origin = self.shard.offsets[self.order[i]] - self.borders[i]
            left, right = max(start, self.borders[i]), min(stop, self.borders[i + 1])
            pieces.append(self.shard.tokens[origin + left : origin + right])
        opens = np.zeros(stop - start, np.bool_)
        inside = self.borders[first : last + 1] - start
        opens[inside[inside >= 0]] = True
        return Rows(np.concatenate(pieces).astype(np.int64)[None], opens[None], np.ones_like(opens)[None])


class Epochs:
    """Rows of T + 1 tokens for ever: each epoch orders the documents anew, cuts them into rows and shuffles the rows.

    Shuffled, because neighbouring rows come from one document and a batch of them would teach little. What is left
    over at the end of an epoch, less than a row, is not read in it.
    """

    key = ""

    def __init__(self, shard: Shard, length: int, seed: int) -> None:
        self.shard, self.length, self.seed = shard, length, seed
        self.rows = (len(shard.tokens) - 1) // length
        if self.rows < 1:
            raise ValueError(
                f"length: {length}; the documents have {len(shard.tokens)} tokens, a row takes {length + 1}"
            )
        self._epoch = -1
        self._text: Concatenation
        self._order: NDArray[np.int64]

    def row(self, number: int) -> Rows:
        epoch, place = divmod(number, self.rows)
        if epoch != self._epoch:
            self._text = Concatenation(self.shard, permutation(len(self.shard), "documents", self.seed, epoch))
            self._order = permutation(self.rows, "rows", self.seed, epoch)
            self._epoch = epoch
        start = int(self._order[place]) * self.length
        return self._text.read(start, start + self.length + 1)


class BestFit:
    """Rows of T + 1 tokens of whole documents: only what is longer than a row is cut. Ding et al. 2024, arXiv
    2404.10830: pieces from the longest on, each into the row with the least room that still holds it.

    What is left of a row is filled with tokens that are no targets and that nothing sees (`padding` is their share).
    The pieces of a cut document overlap by one token, as rows do; a document of one token predicts nothing and is left
    out. Every epoch reads the same rows in another order.
    """

    key = "best_fit"

    def __init__(self, shard: Shard, length: int, seed: int) -> None:
        self.shard, self.length, self.seed = shard, length, seed
        self._rows = packed(pieces(shard.offsets, length), length + 1)
        if not self._rows:
            raise ValueError(f"length: {length}; no document has two tokens")
        self._epoch = -1
        self._order: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self._rows)

    @cached_property
    def padding(self) -> float:
        used = sum(stop - start for row in self._rows for start, stop in row)
        return 1 - used / (self.rows * (self.length + 1))

    def row(self, number: int) -> Rows:
        epoch, place = divmod(number, self.rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.rows, "rows", self.seed, epoch)
        tokens = np.zeros(self.length + 1, np.int64)
        opens, counted = np.zeros_like(tokens, np.bool_), np.zeros_like(tokens, np.bool_)
        at = 0
        for start, stop in self._rows[int(self._order[place])]:
            end = at + stop - start
            tokens[at:end] = self.shard.tokens[start:stop]
            opens[at], counted[at:end], at = True, True, end
        opens[at : at + 1] = True
        return Rows(tokens[None], opens[None], counted[None])


def pieces(offsets: NDArray[np.int64], length: int) -> list[tuple[int, int]]:
    """Where the pieces of documents begin and end: each of up to length + 1 tokens and at least 2."""
    found = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        found += [(at, min(at + length + 1, stop)) for at in range(start, stop - 1, length)]
    return found


def packed(given: Sequence[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Best-fit decreasing: bins of at most `room` tokens. Of equal pieces the first in the text goes first."""
    bins: list[list[tuple[int, int]]] = []
    free: list[tuple[int, int]] = []  # (room left, number of the bin), sorted
    for start, stop in sorted(given, key=lambda piece: piece[0] - piece[1]):
        size = stop - start
        at = bisect_left(free, (size, -1))
        left, number = free.pop(at) if at < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append((start, stop))
        if left - size > 1:
            insort(free, (left - size, number))
    return bins


BLOCK = 4096
"""Rows over which a blend keeps its shares: after every block, each source has given its share, to a row or two."""


class Blend:
    """Rows of several sources, each with its share of them; which source a row is from hangs on its number alone."""

    def __init__(self, sources: Sequence[Rowed], weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        self.sources, self.shares, self.seed = tuple(sources), tuple(w / total for w in weights), seed
        if least := min((w for w in self.shares if w * BLOCK < 2), default=None):
            raise ValueError(f"weight: a share of {least:.2g} of the rows; accepted: {2 / BLOCK:.2g} or more")
        self._block = -1
        self._from: NDArray[np.int64]
        self._rank: NDArray[np.int64]

    @property
    def key(self) -> str:
        return repr([(source.key, share) for source, share in zip(self.sources, self.shares, strict=True)])

    @property
    def rows(self) -> int:
        """So many that the source that is read most often has been read once."""
        return max(1, min(int(s.rows / share) for s, share in zip(self.sources, self.shares, strict=True)))

    def _given(self, block: int) -> NDArray[np.int64]:
        """How many rows of each source stand before a block."""
        ends = np.rint(np.cumsum((0.0, *self.shares)) * block * BLOCK).astype(np.int64)
        return np.diff(ends)

    def row(self, number: int) -> Rows:
        block, place = divmod(number, BLOCK)
        if block != self._block:
            before, after = self._given(block), self._given(block + 1)
            each = np.repeat(np.arange(len(self.sources)), after - before)
            self._from = each[permutation(BLOCK, "blend", self.seed, block)]
            self._rank = np.zeros(BLOCK, np.int64)
            for i, first in enumerate(before):
                mine = self._from == i
                self._rank[mine] = first + np.arange(int(mine.sum()))
            self._block = block
        return self.sources[int(self._from[place])].row(int(self._rank[place]))


def flatten(rows: Rows, token_bytes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Rows on the flat axis, N = R * T: inputs, targets, seq, index, target_bytes, each [N], and starts [B+1].

    A row's first token opens a sequence, for nothing crosses a row. A target is IGNORED where the next token opens a
    document or is not counted.
    """
    first = rows.opens[:, :-1].copy()
    first[:, 0] = True
    first = first.reshape(-1)
    follows = rows.counted[:, 1:] & ~rows.opens[:, 1:]
    targets = np.where(follows, rows.tokens[:, 1:], IGNORED).reshape(-1)
    starts = np.append(np.flatnonzero(first), len(first))
    seq = np.cumsum(first) - 1
    return {
        "inputs": rows.tokens[:, :-1].reshape(-1),
        "targets": targets,
        "seq": seq,
        "index": np.arange(len(first)) - starts[seq],
        "starts": starts,
        "target_bytes": np.where(targets >= 0, token_bytes[targets], 0),
    }
