"""A step's states one token further: what `begin` would make of the same sequences' next tokens, written where the last
ones stand. Of the tables of a decode step little changes from a token to the next, and all of it is known here.

Legend: B sequences of the step, S entries of a view, n the place of the new token in its sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import numpy as np

from assay.cache.cache import Cache
from assay.cache.groups import Group, PageCut, Table
from assay.cache.paged import Paged
from assay.cache.size import Kind
from assay.cache.states import Stored
from assay.cache.store import Slot
from assay.cache.tables import ROUND, Entries, Saves, Writing
from assay.ops.state import State
from assay.ops.step import Step

AT_ONCE = 64  # tokens that are looked ahead at most
WIDER = 512  # entries that a view may have beyond those that its sequences need: masks are made for all of them


class Field(Protocol):
    """Token fields of one kind: entries in rows, or in pages."""

    def takes(self, rows: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether it could go on with the sequences in these rows, as many as before, one perhaps twice. False where
        the view is another one for them, or far wider than they need."""

    def seat(self, rows: Sequence[int]) -> None:
        """Go on with those."""

    def fits(self, lengths: Sequence[int]) -> bool:
        """Room for the next tokens, taken where it must be; False where views get another shape or place by it."""

    def write(self, lengths: Sequence[int]) -> None:
        """Enter them."""

    def room(self, lengths: Sequence[int]) -> int:
        """How many tokens each sequence can take after these before the view is another one."""

    def foretell(self, lengths: Sequence[int]) -> None:
        """As if the next tokens were there, in the step's tensors alone."""

    @property
    def view(self) -> View: ...


class View:
    """The step's tensors of one kind, as arrays that share their memory."""

    def __init__(self, writing: Writing) -> None:
        self.place, layout = writing.place.numpy(), writing.layout
        self.seq, self.index, self.positions = (t.numpy() for t in (layout.seq, layout.index, layout.positions))

    def enter(self, i: int, entry: int, n: int, place: int) -> None:
        self.place[i] = place
        self.seq[i, entry], self.index[i, entry], self.positions[i, entry] = i, n, n

    @property
    def arrays(self) -> list[np.ndarray]:
        return [self.place, self.seq, self.index, self.positions]


class InRows:
    """Entries of rows, one after another or in a ring."""

    def __init__(self, entries: Entries, rows: Sequence[int], writing: Writing) -> None:
        self.entries, self.rows, self.view = entries, rows, View(writing)
        self.index, self.positions = entries.index.numpy(), entries.positions.numpy()

    def takes(self, rows: Sequence[int], lengths: Sequence[int]) -> bool:
        return False  # a step reads rows of the store where they stand

    def seat(self, rows: Sequence[int]) -> None:
        raise AssertionError("no other rows are taken")

    def fits(self, lengths: Sequence[int]) -> bool:
        used = max(lengths) + 1
        return min(self.entries.capacity, -(-used // ROUND) * ROUND) == self.view.index.shape[1]

    def write(self, lengths: Sequence[int]) -> None:
        capacity = self.entries.capacity
        for i, (row, n) in enumerate(zip(self.rows, lengths, strict=True)):
            entry = n % capacity
            self.entries.high[row] = n + 1
            self.entries.low[row] = max(self.entries.low[row], n + 1 - capacity)
            self.index[row, entry] = self.positions[row, entry] = n
            self.view.enter(i, entry, n, row * capacity + entry)

    def room(self, lengths: Sequence[int]) -> int:
        width = self.view.index.shape[1]
        return AT_ONCE if width == self.entries.capacity and self.entries.keep else width - max(lengths)

    def foretell(self, lengths: Sequence[int]) -> None:
        for i, n in enumerate(lengths):
            self.view.enter(i, n % self.entries.capacity, n, 0)


class InPages:
    """Pages of a group. A table is written again only where it is another than it was."""

    def __init__(self, store: Paged, kind: Kind, rows: Sequence[int], writing: Writing) -> None:
        cut = cast(PageCut, writing.cut)
        self.store, self.kind, self.group, self.rows, self.run = store, kind, store.groups[kind], rows, cut.run
        self.view, self.table, self.positions = View(writing), cut.table.numpy(), self.group.positions.numpy()
        self.known: list[tuple[int, list[int]] | None] = [None] * len(rows)

    def takes(self, rows: Sequence[int], lengths: Sequence[int]) -> bool:
        page, tables = self.group.page, self.group.tables
        need = max(n + 1 - tables[row].base * page for row, n in zip(rows, lengths, strict=True))
        return self.run is None and need <= self.view.index.shape[1] <= need + WIDER

    def seat(self, rows: Sequence[int]) -> None:
        self.rows, self.known = rows, [None] * len(rows)

    def fits(self, lengths: Sequence[int]) -> bool:
        group, ones = self.group, [1] * len(self.rows)
        moved = group.grow(self.rows, lengths, ones)  # doing it twice does it once: `begin` may still come
        self.store._clear(self.kind, moved.clear)
        for source, target in moved.copy:
            self.store._copy_page(self.kind, source, target)
        grow, tables = max(1, ROUND // group.page), [group.tables[row] for row in self.rows]
        most = max(len(table.pages) for table in tables)
        if min(-(-most // grow) * grow, group.blocks.total) > self.table.shape[1]:
            return False
        for i, table in enumerate(tables):
            if self.known[i] != (table.base, table.pages):
                if not self._in_run(i, table):
                    return False
                self._rewrite(i, table, lengths[i])
        return True

    def _in_run(self, i: int, table: Table) -> bool:
        """Whether a step that reads a run of pages as it stands finds the row's there."""
        first = 0 if self.run is None else self.run[0] + i * self.table.shape[1]
        return self.run is None or table.pages == list(range(first, first + len(table.pages)))

    def _rewrite(self, i: int, table: Table, length: int) -> None:
        """Behind the row's pages its first one stands again, of which nobody sees anything there."""
        page, view, count = self.group.page, self.view, len(table.pages)
        self.table[i, :count], self.table[i, count:] = table.pages, table.pages[0]
        index = table.base * page + np.arange(view.index.shape[1])
        there = index < length
        view.seq[i], view.index[i] = np.where(there, i, -1), np.where(there, index, -1)
        view.positions[i] = self.positions[self.table[i]].reshape(-1)
        self.known[i] = table.base, list(table.pages)

    def write(self, lengths: Sequence[int]) -> None:
        page = self.group.page
        for i, (row, n) in enumerate(zip(self.rows, lengths, strict=True)):
            table, inside = self.group.tables[row], n % page
            base, number = table.base, table.pages[n // page - table.base]
            self.positions[number, inside] = n
            self.view.enter(i, n - base * page, n, number * page + inside)

    def room(self, lengths: Sequence[int]) -> int:
        group, width, found = self.group, self.view.index.shape[1], AT_ONCE
        for row, n in zip(self.rows, lengths, strict=True):
            base = group.tables[row].base
            found = min(found, base * group.page + width - n)
            if group.keep is not None:  # until the next page leaves the window
                kept = (group.first(max(0, k - group.chunk)) for k in range(n + 1, n + 1 + found))
                found = next((k for k, first in enumerate(kept) if first > base), found)
        return found

    def foretell(self, lengths: Sequence[int]) -> None:
        for i, (row, n) in enumerate(zip(self.rows, lengths, strict=True)):
            self.view.enter(i, n - self.group.tables[row].base * self.group.page, n, 0)


def needs_pages(group: Group, row: int, n: int) -> bool:
    """Whether the token at place n begins a page, or its page is shared and is copied for it."""
    return n % group.page == 0 or group.blocks.refs[group.tables[row].pages[-1]] > 1


class Onward:
    """A step of a token for each of these slots, and its states, that can be moved on by one token again and again.

    `of` says None where something is not known to move so: fields in codes, memories, a step of another kind. The
    step's and states' tensors must be nobody else's.

    The step has a seat for each sequence. Others may take the seats, and fewer than there are: in the seats behind them
    the shortest one sits again, whose token is computed there once more from the same state, and stored where it is
    stored anyway.
    """

    def __init__(self, store: Cache | Paged, slots: Sequence[Slot], step: Step, states: Mapping[str, State]) -> None:
        self.store, self.slots, self.rows = store, tuple(slots), [slot.row for slot in slots]
        own = {part: cast(Stored, state) for part, state in states.items()}
        writings = {store.kinds[part]: state.writing for part, state in own.items() if state.writing is not None}
        self.fields = [self._field(kind, w) for kind, w in writings.items() if kind is not None]
        self.saving = next((state.saving for state in own.values() if state.saving is not None), None)
        self.ids, self.index, self.past = (t.numpy() for t in (step.ids, step.index, step.past))
        self.horizon = step.horizon.numpy()
        self.left = [store.length(slot) for slot in slots]  # as this left them
        self.taken = list(range(len(slots)))  # which of the sequences sits in each seat

    @classmethod
    def of(cls, store: object, slots: Sequence[Slot], step: Step, states: Mapping[str, State]) -> Onward | None:
        if type(store) not in (Cache, Paged) or not step.index.is_cpu:
            return None
        plain = set(step.inputs) == {"ids"} and step.positions is step.index and step.prefix is None
        single = step.tokens == len(slots) == step.decodes and step.encode is None and step.memory is None
        known = all(isinstance(state, Stored) and _moves(state) for state in states.values())
        return cls(cast(Cache | Paged, store), slots, step, states) if plain and single and known else None

    def _field(self, kind: Kind, writing: Writing) -> Field:
        if isinstance(self.store, Paged):
            return InPages(self.store, kind, self.rows, writing)
        return InRows(self.store.entries[kind], self.rows, writing)

    @property
    def seats(self) -> int:
        return len(self.rows)

    def seat(self, slots: Sequence[Slot], horizons: Mapping[Slot, int]) -> bool:
        """Go on with these sequences, each with its horizon; False where the step cannot be theirs."""
        spare = self.seats - len(slots)
        if spare < 0:
            return False
        lengths = [self.store.length(slot) for slot in slots]
        least = min(range(len(slots)), key=lengths.__getitem__)
        taken = [*range(len(slots)), *[least] * spare]
        rows, left = [slots[i].row for i in taken], [lengths[i] for i in taken]
        if not all(field.takes(rows, left) for field in self.fields):
            return False
        for field in self.fields:
            field.seat(rows)
        self.slots, self.rows, self.left, self.taken = tuple(slots), rows, left, taken
        self.horizon[:] = [horizons[slots[i]] for i in taken]
        return True

    def follows(self, slots: Sequence[Slot]) -> bool:
        """Whether these are the same sequences, as they were left."""
        if tuple(slots) != self.slots:
            return False
        lengths = self.store.lengths
        return [lengths.get(row) for row in self.rows] == self.left and all(
            self.store.births[slot.row] == slot.birth for slot in self.slots
        )

    def move(self, ids: Sequence[int]) -> bool:
        """Take these tokens in; False where `begin` must. ValueError where they do not fit, as from `begin`."""
        if isinstance(self.store, Paged):
            pairs = list(zip(self.rows, self.left, strict=True))
            if any(needs_pages(group, row, n) for group in self.store.groups.values() for row, n in pairs):
                self.store._check(self.rows[: len(ids)], [1] * len(ids))
        elif max(self.left) >= self.store.size.tokens:
            return False
        if not all(field.fits(self.left) for field in self.fields):
            return False
        for field in self.fields:
            field.write(self.left)
        if self.saving is not None and self.store.saves is not None:
            saved = _saved(self.store.saves, self.rows[: len(ids)], self.left[: len(ids)])
            self.saving.start.numpy()[:] = [saved[i][0] for i in self.taken]
            self.saving.place.numpy()[:] = [saved[i][1] for i in self.taken]
        self.ids[:], self.index[:], self.past[:] = [ids[i] for i in self.taken], self.left, self.left
        self.left = [n + 1 for n in self.left]
        self.store.lengths.update(zip(self.rows, self.left, strict=True))
        if isinstance(self.store, Paged):
            for slot, token in zip(self.slots, ids, strict=True):
                self.store.texts[slot.row].tokens.append(token)
        return True

    def foretold(self, count: int) -> Iterator[None]:
        """The step's tensors as they will be for each of the next tokens, of up to `count`; then as they were. The
        cache stays as it is."""
        arrays = [self.index, self.past, *(a for field in self.fields for a in field.view.arrays)]
        kept = [(a, a.copy()) for a in arrays]
        room = min((field.room(self.left) for field in self.fields), default=count)
        try:
            for further in range(max(0, min(count, room))):
                lengths = [n + further for n in self.left]
                self.index[:], self.past[:] = lengths, lengths
                for field in self.fields:
                    field.foretell(lengths)
                yield
        finally:
            for a, was in kept:
                a[:] = was


def _moves(state: Stored) -> bool:
    if state.layout_key is None:
        return True
    return state.layout_key[0] == "token" and state.writing is not None and state.writing.arrival.real is None


def _saved(saves: Saves, rows: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each sequence's current state stands, and where the next one goes: a place of its own, or the same."""
    return [(saves.place(row), saves._enter(row, n + 1)) for row, n in zip(rows, lengths, strict=True)]
