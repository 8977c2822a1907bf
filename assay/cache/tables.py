"""Which entry of a store holds what: bookkeeping without the stored values, shared by all layers of one shape.

Legend: n tokens that are stored, R rows of the cache, C entries of a row, B sequences of the step, S entries of a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from assay.ops.step import InPages, Layout, Step
from assay.ops.tape import HOST

ROUND = 64  # views grow in steps of so many entries, so that shapes change seldom


@dataclass(frozen=True)
class Arrival:
    """The tokens of one step and the rows they go to. `real`: which of the tokens are not padding (None: all)."""

    rows: tuple[int, ...] = field(metadata=HOST)
    real: Int[Tensor, "n"] | None
    seq: Int[Tensor, "n"]
    row: Int[Tensor, "n"]
    index: Int[Tensor, "n"]
    positions: Int[Tensor, "n"]

    @classmethod
    def of(cls, rows: Sequence[int], seq: Tensor, index: Tensor, positions: Tensor, stored: int) -> Arrival:
        """`rows[i]` is the cache's row of the step's sequence i; `stored` is how many of the tokens are not padding."""
        real = None if stored == seq.shape[0] else (seq >= 0).nonzero().squeeze(1)
        if real is not None:
            seq, index, positions = (t.index_select(0, real) for t in (seq, index, positions))
        row = torch.tensor(rows, device=seq.device).index_select(0, seq)
        return cls(tuple(rows), real, seq, row, index, positions)

    def pick(self, new: Tensor) -> Tensor:
        """The values of the real tokens among [N, ...]."""
        return new if self.real is None else new.index_select(0, self.real)


def one_a_row(step: Step, count: int) -> bool:
    """Whether row r of the step's grid holds tokens of sequence r alone (and padding)."""
    if step.grid is None or step.grid[0] != count:
        return False
    if step.grid == (1, step.tokens) and count == 1:
        return True
    seq = step.seq.view(step.grid)
    own = torch.arange(count, device=seq.device)[:, None]
    return bool(((seq == own) | (seq < 0)).all())


class Reads(Protocol):
    """The part of a store that a step reads."""

    def of(self, pool: Tensor) -> Tensor:
        """[R or pages, C or page, ...] to [B, S, ...]."""

    def fields(self, pools: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each of them so, and copied only when it is asked for by its name."""


@dataclass(frozen=True)
class Cut:
    """A run of rows (a slice of the store itself) or picked rows (a copy, if they are asked for by name)."""

    entries: int
    run: tuple[int, int] | None  # its first row, and one past its last
    table: Int[Tensor, "B 1"]

    @classmethod
    def of_rows(cls, rows: Sequence[int], entries: int, device: torch.device) -> Cut:
        run = (rows[0], rows[0] + len(rows))
        return cls(
            entries, run if tuple(rows) == tuple(range(*run)) else None, torch.tensor(rows, device=device)[:, None]
        )

    def of(self, pool: Tensor) -> Tensor:
        """[R, C, ...] to [B, S, ...]."""
        if self.run is not None:
            return pool[self.run[0] : self.run[1], : self.entries]
        return pool[:, : self.entries].index_select(0, self.table[:, 0])

    def fields(self, pools: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.run is not None:
            return {name: self.of(pool) for name, pool in pools.items()}
        return InPages({name: pool[:, : self.entries] for name, pool in pools.items()}, self.table)  # a page is a row


@dataclass(frozen=True)
class Writing:
    """What `append` needs in one step: where each token's entry goes in the flattened store, and what is then seen."""

    arrival: Arrival
    place: Int[Tensor, "n"]
    cut: Reads
    layout: Layout


@dataclass(frozen=True)
class Book:
    """What stands in one row of a store, on the host: its places, `low` to `high`, and their positions."""

    index: Int[Tensor, "C"]
    positions: Int[Tensor, "C"]
    low: int
    high: int


class Entries:
    """Places of token (or memory) entries. Place p of a row stands in entry p mod capacity: a ring once it is full."""

    def __init__(self, rows: int, capacity: int, keep: int | None, device: torch.device) -> None:
        self.capacity, self.keep = capacity, keep
        self.index = torch.full((rows, capacity), -1, dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, capacity), dtype=torch.long, device=device)
        self.low = [0] * rows  # the first place of each row that is still there
        self.high = [0] * rows  # one past its last place

    def arrive(self, arrival: Arrival, counts: Sequence[int], aligned: bool) -> Writing:
        """Enter the step's tokens, `counts[i]` of them for its sequence i."""
        for row, count in zip(arrival.rows, counts, strict=True):
            self.high[row] += count
            self.low[row] = max(self.low[row], self.high[row] - self.capacity)
        place = arrival.row * self.capacity + arrival.index.remainder(self.capacity)
        self.index.view(-1).index_copy_(0, place, arrival.index)
        self.positions.view(-1).index_copy_(0, place, arrival.positions)
        return Writing(arrival, place, *self.seen(arrival.rows, aligned))

    def seen(self, rows: tuple[int, ...], aligned: bool) -> tuple[Cut, Layout]:
        """The part of the store that these rows fill, and what stands in it; the step's sequence i is `rows[i]`."""
        used = max(self.high[row] for row in rows)
        cut = Cut.of_rows(rows, min(self.capacity, -(-max(used, 1) // ROUND) * ROUND), self.index.device)
        index, positions = cut.of(self.index), cut.of(self.positions)
        own = torch.arange(len(rows), device=index.device)[:, None]
        return cut, Layout(torch.where(index >= 0, own, -1), index, positions, aligned)

    def has(self, row: int, length: int) -> bool:
        """Whether the row can be cut back to `length`: every place that a token there would see is still there."""
        first = 0 if self.keep is None else max(0, length - self.keep + 1)
        return length == 0 or self.low[row] <= first

    def rewind(self, row: int, length: int) -> None:
        self.index[row].masked_fill_(self.index[row] >= length, -1)
        self.high[row] = length
        self.low[row] = 0 if length == 0 else self.low[row]

    def copy(self, source: int, target: int) -> None:
        self.index[target], self.positions[target] = self.index[source], self.positions[source]
        self.low[target], self.high[target] = self.low[source], self.high[source]

    def book(self, row: int) -> Book:
        index, positions = (t[row].to("cpu", copy=True) for t in (self.index, self.positions))
        return Book(index, positions, self.low[row], self.high[row])

    def write(self, row: int, book: Book) -> None:
        self.index[row], self.positions[row] = book.index.to(self.index.device), book.positions.to(self.index.device)
        self.low[row], self.high[row] = book.low, book.high

    def check(self, row: int, length: int | None) -> None:
        """Every place from `low` to `high` stands in its own entry, and nothing else stands anywhere."""
        assert length is None or self.high[row] == length, f"row {row}: {self.high[row]} entries, {length} tokens"
        expected = torch.full((self.capacity,), -1)
        places = torch.arange(self.low[row], self.high[row])
        assert len(places) <= self.capacity, f"row {row}: {len(places)} entries in a store of {self.capacity}"
        expected[places % self.capacity] = places
        assert torch.equal(self.index[row].cpu(), expected), f"row {row}: entries and table differ"


@dataclass(frozen=True)
class Saving:
    """What `load` and `store` need in one step: the saved state each sequence starts from, and where new ones go."""

    start: Int[Tensor, "B"]
    chosen: Int[Tensor, "m"] | None  # which of step.saves are kept; None: all, in their order
    place: Int[Tensor, "m"]


class Saves:
    """Which lengths of each row have a saved state: `depth` of them, in order of length from the cursor backwards."""

    def __init__(self, rows: int, depth: int, device: torch.device) -> None:
        self.depth, self.device = depth, device
        self.lengths: list[list[int | None]] = [[None] * depth for _ in range(rows)]
        self.cursor = [0] * rows

    def open(self, row: int, length: int = 0) -> int:
        """Start the row at this length; returns the place that must hold its state (at length 0, the initial one)."""
        self.lengths[row], self.cursor[row] = [length] + [None] * (self.depth - 1), 0
        return row * self.depth

    def place(self, row: int) -> int:
        """Where the current state of the row stands."""
        return row * self.depth + self.cursor[row]

    def arrive(self, rows: Sequence[int], step: Step, lengths: Sequence[int]) -> Saving:
        """`lengths[i]`: tokens of the step's sequence i once the step is done; each that grows must be saved there.
        ValueError otherwise, before anything has changed."""
        assert step.saves is not None
        start = [self.place(row) for row in rows]
        saved: dict[int, list[tuple[int, int]]] = {}
        places, seqs = (t.index_select(0, step.saves).tolist() for t in (step.index, step.seq))
        for number, (seq, place) in enumerate(zip(seqs, places, strict=True)):
            if seq >= 0:  # a sequence that rests in this step is padding
                saved.setdefault(seq, []).append((number, place + 1))
        for seq, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            last = saved[seq][-1][1] if seq in saved else self.lengths[row][self.cursor[row]]
            if last != length:
                raise ValueError(f"step.saves lacks the last token of sequence {seq}, place {length - 1}")
        chosen, place = [], []
        for seq, found in saved.items():
            for number, length in found[-self.depth :]:
                chosen.append(number)
                place.append(self._enter(rows[seq], length))
        made = [torch.tensor(t, dtype=torch.long, device=self.device) for t in (start, chosen, place)]
        return Saving(made[0], None if chosen == list(range(len(places))) else made[1], made[2])

    def _enter(self, row: int, length: int) -> int:
        self.cursor[row] = (self.cursor[row] + 1) % self.depth
        self.lengths[row][self.cursor[row]] = length
        return self.place(row)

    def has(self, row: int, length: int) -> bool:
        return length == 0 or length in self.lengths[row]

    def rewind(self, row: int, length: int) -> None:
        """To a saved length above 0 (a row that goes back to 0 is opened anew)."""
        self.cursor[row] = self.lengths[row].index(length)
        self.lengths[row] = [n if n is not None and n <= length else None for n in self.lengths[row]]

    def copy(self, source: int, target: int) -> None:
        self.lengths[target], self.cursor[target] = list(self.lengths[source]), self.cursor[source]

    def check(self, row: int, length: int) -> None:
        saved = self.lengths[row]
        assert saved[self.cursor[row]] == length, f"row {row}: saved at {saved}, but it has {length} tokens"
        order = [n for i in range(self.depth) if (n := saved[(self.cursor[row] - i) % self.depth]) is not None]
        assert order == sorted(set(order), reverse=True), f"row {row}: saved lengths {order} are not in order"
