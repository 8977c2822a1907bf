"""Packing without padding: documents one after another, cut into rows, and nothing attends across a border.

A row is T + 1 tokens: the first T are inputs, the last T what follows each. Rows overlap by that one token, so
every token is an input once, and a target once unless it opens a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.data.draws import permutation
from assay.data.shards import Shard

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
