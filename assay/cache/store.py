"""What every cache has: open sequences with a row each, in which memories and sequence fields stand. No maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from assay.cache.groups import PageBook
from assay.cache.prefix import Text
from assay.cache.shelves import Shelf, allocated
from assay.cache.size import Fields, Kind, PageSize, Size
from assay.cache.states import Stored
from assay.cache.tables import Arrival, Book, Entries, Reads, Saves, Saving, Writing, one_a_row
from assay.ops.state import State, dtype_of
from assay.ops.step import Layout, Step
from assay.spec.base import StateField

Seen = tuple[Reads, Layout]


@dataclass(frozen=True)
class Slot:
    """A sequence that is open; it is void once closed, also when its row is used again."""

    row: int
    birth: int


@dataclass(frozen=True)
class Swapped:
    """A sequence on the host: everything that its cache needs to go on with it. Only that cache, or one of the same
    fields and size, takes it back."""

    length: int
    tensors: dict[tuple[str, str], Tensor]  # by part and field
    books: dict[Kind, Book]
    saved: tuple[list[int | None], int] | None
    tables: dict[Kind, PageBook] = field(default_factory=dict)
    text: Text | None = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Store:
    """Rows of sequences. How token fields are stored is for who derives from it: `_tokens`, `_seen`, `_has`, ..."""

    def __init__(
        self, fields: Fields, size: Size | PageSize, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.fields, self.dtype, self.device = dict(fields), dtype, torch.device(device)
        self.kinds = {part: _kind(part, declared, size) for part, declared in fields.items()}
        self.pools, self.shelves = allocated(
            {part: {f.name: self._shelf(part, f, size) for f in declared} for part, declared in fields.items()},
            self.device,
        )
        self.entries: dict[Kind, Entries] = {}
        for kind in self.kinds.values():
            if kind is not None and kind[0] == "memory":
                self.entries[kind] = Entries(size.rows, kind[1], None, self.device)
        sequential = any(f.per == "sequence" for f, _ in self.tensors())
        self.saves = Saves(size.rows, size.saves, self.device) if sequential else None
        self.lengths: dict[int, int] = {}  # tokens of each open row
        self.births = [0] * size.rows

    def _shelf(self, part: str, field: StateField, size: Size | PageSize) -> Shelf:
        shape = (*size.shape(field), *field.shape)
        return Shelf(self.kinds[part], field.per, field.per == "token", shape, dtype_of(field, self.dtype))

    def tensors(self) -> list[tuple[StateField, Tensor]]:
        return [(f, self.pools[part][f.name]) for part, declared in self.fields.items() for f in declared]

    def reserved_bytes(self) -> int:
        """Bytes of the stored fields as allocated; the tables that all layers share are not counted."""
        return sum(stores.numel() * stores.element_size() for stores in self.shelves.values())

    def used_bytes(self) -> int:
        """Bytes that the open sequences can still read, by the fields' own declaration."""
        width, total = str(self.dtype).removeprefix("torch."), 0
        for row, length in self.lengths.items():
            memory = max((e.high[row] for kind, e in self.entries.items() if kind[0] == "memory"), default=0)
            total += sum(f.bytes(length, width, memory) for declared in self.fields.values() for f in declared)
        return total

    def _take_row(self) -> Slot:
        free = next((row for row in range(len(self.births)) if row not in self.lengths), None)
        if free is None:
            raise ValueError(f"no free row: all {len(self.births)} of this cache are open")
        self.lengths[free] = 0
        self._start(free)
        return Slot(free, self.births[free])

    def _start(self, row: int) -> None:
        """Sequence fields of the row at their initial values."""
        if self.saves is not None:
            place = self.saves.open(row)
            for declared, pool in self.tensors():
                if declared.per == "sequence":
                    pool[place] = declared.init

    def _row(self, slot: Slot) -> int:
        if slot.row not in self.lengths or self.births[slot.row] != slot.birth:
            raise ValueError(f"slot {slot} is closed")
        return slot.row

    def length(self, slot: Slot) -> int:
        return self.lengths[self._row(slot)]

    def begin(self, slots: Sequence[Slot], step: Step) -> dict[str, State]:
        """The state of every part for this step. All tables are brought up to date here, once; parts only write.
        ValueError when the step does not continue what is stored or does not fit; then nothing has changed."""
        rows = tuple(self._row(slot) for slot in slots)
        counts = self._counts(rows, step)
        memories = self._memories(rows, step)
        self._check(rows, counts)
        lengths = [self.lengths[row] + count for row, count in zip(rows, counts, strict=True)]
        saving = self.saves.arrive(rows, step, lengths) if self.saves is not None else None
        arrival, aligned = (
            Arrival.of(rows, step.seq, step.index, step.positions, sum(counts)),
            one_a_row(step, len(rows)),
        )
        writing = self._tokens(arrival, counts, aligned, step) | self._memorise(rows, step, memories, aligned)
        seen: dict[Kind, Seen] = {kind: (made.cut, made.layout) for kind, made in writing.items()}
        for kind, entries in self.entries.items():
            if kind not in seen:
                seen[kind] = entries.seen(rows, aligned)
        self.lengths.update(zip(rows, lengths, strict=True))
        return {part: self._state(part, seen, writing, saving) for part in self.fields}

    def _state(
        self, part: str, seen: Mapping[Kind, Seen], writing: Mapping[Kind, Writing], saving: Saving | None
    ) -> State:
        kind = self.kinds[part]
        if kind is None:
            return Stored(part, self.pools[part], None, None, None, saving)
        return Stored(part, self.pools[part], kind, seen[kind], writing.get(kind), saving)

    def _counts(self, rows: tuple[int, ...], step: Step) -> list[int]:
        """New tokens of each sequence. ValueError when the step does not continue what is stored."""
        if len(set(rows)) != len(rows):
            raise ValueError("a slot stands twice in one step")
        if step.tree is not None:
            raise ValueError("a step with a tree cannot be stored: entries are told apart by their place")
        if step.past.shape[0] != len(rows):
            raise ValueError(f"the step has {step.past.shape[0]} sequences, and {len(rows)} slots are given")
        counts = torch.bincount(step.seq[step.seq >= 0], minlength=len(rows)).tolist()
        if len(counts) != len(rows):
            raise ValueError(
                f"a token of the step belongs to sequence {len(counts) - 1}, and {len(rows)} slots are given"
            )
        if self.saves is not None and step.saves is None:
            raise ValueError("step.saves is missing: the tokens after which sequence fields are kept")
        for i, (row, past) in enumerate(zip(rows, step.past.tolist(), strict=True)):
            if past != self.lengths[row]:
                raise ValueError(
                    f"sequence {i}: the step continues after {past} tokens, but {self.lengths[row]} are stored"
                )
        return list(counts)

    def _memories(self, rows: tuple[int, ...], step: Step) -> list[int]:
        """Tokens of the memory that this step brings to each sequence. ValueError where they do not fit."""
        source = step.memory or step.encode
        kinds = [kind for kind in self.entries if kind[0] == "memory"]
        if source is None or not kinds:
            return []
        counts = torch.bincount(source.seq[source.seq >= 0], minlength=len(rows)).tolist()
        for _, capacity in kinds:
            if len(counts) != len(rows) or max(counts) > capacity:
                raise ValueError(
                    f"a memory of {max(counts)} tokens for {len(counts)} sequences; {capacity} for {len(rows)} fit"
                )
        return list(counts)

    def _memorise(self, rows: tuple[int, ...], step: Step, counts: Sequence[int], aligned: bool) -> dict[Kind, Writing]:
        """Room for the memory that this step brings; it replaces what its sequences had."""
        source, made = step.memory or step.encode, {}
        for kind, entries in self.entries.items() if counts and source is not None else ():
            if kind[0] == "memory":
                for row, count in zip(rows, counts, strict=True):
                    if count:
                        entries.rewind(row, 0)
                assert source is not None
                arrival = Arrival.of(rows, source.seq, source.index, source.index, sum(counts))
                made[kind] = entries.arrive(arrival, counts, aligned)
        return made

    def settle(self, slots: Sequence[Slot]) -> None:
        """The forward of these sequences' step has succeeded."""

    def fork(self, slot: Slot) -> Slot:
        """A new slot with everything that this one has stored; what either does later, the other does not see."""
        row, made = self._row(slot), self._take_row()
        self.lengths[made.row] = self.lengths[row]
        depth = 0 if self.saves is None else self.saves.depth
        for part, declared in self.fields.items():
            for f in declared:
                pool = self.pools[part][f.name]
                if f.per == "sequence":
                    pool[made.row * depth : (made.row + 1) * depth] = pool[row * depth : (row + 1) * depth]
                elif self.kinds[part] in self.entries:
                    pool[made.row] = pool[row]
        for entries in self.entries.values():
            entries.copy(row, made.row)
        if self.saves is not None:
            self.saves.copy(row, made.row)
        self._forked(row, made.row)
        return made

    def reach(self, slot: Slot, length: int) -> int:
        """The longest length up to `length` that `rewind` can go back to: rings have overwritten old entries, and
        sequence fields stand at their saved lengths only. 0 always can."""
        row = self._row(slot)
        at = min(length, self.lengths[row])
        saved = [at] if self.saves is None else [n for n in self.saves.lengths[row] if n is not None and n <= at]
        return max((n for n in saved if self._has(row, n)), default=0)

    def rewind(self, slot: Slot, length: int) -> None:
        """Forget every token from place `length` on. A memory stays. ValueError for a length that is out of reach."""
        row = self._row(slot)
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"rewind to {length}: the sequence has {self.lengths[row]} tokens")
        if self.reach(slot, length) != length:
            raise ValueError(
                f"rewind to {length}: no longer stored; the nearest before it is {self.reach(slot, length)}"
            )
        self._cut(row, length)
        if length == 0:
            self._start(row)
        elif self.saves is not None:
            self.saves.rewind(row, length)
        self.lengths[row] = length

    def close(self, slot: Slot) -> None:
        """Give the row back, cleared: values that are not finite must not reach the next sequence."""
        row = self._row(slot)
        for part, pools in self.pools.items():
            for f in self.fields[part]:
                if f.per != "sequence" and self.kinds[part] in self.entries:
                    pools[f.name][row].zero_()
        for entries in self.entries.values():
            entries.rewind(row, 0)
        self._closed(row)
        del self.lengths[row]
        self.births[row] += 1

    def _places(self, part: str, declared: StateField, row: int) -> Tensor:
        """Where in its store the field of this row stands."""
        kind, depth = self.kinds[part], 0 if self.saves is None else self.saves.depth
        if declared.per == "sequence":
            places = list(range(row * depth, (row + 1) * depth))
        else:
            assert kind is not None
            places = [row] if kind in self.entries else self._pages(kind, row)
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def swap_out(self, slot: Slot) -> Swapped:
        """Copy the sequence to the host and close it."""
        row = self._row(slot)
        tensors = {
            (part, f.name): self.pools[part][f.name].index_select(0, self._places(part, f, row)).cpu()
            for part, declared in self.fields.items()
            for f in declared
        }
        books = {kind: entries.book(row) for kind, entries in self.entries.items()}
        saved = None if self.saves is None else (list(self.saves.lengths[row]), self.saves.cursor[row])
        swapped = Swapped(self.lengths[row], tensors, books, saved)
        self.close(slot)
        return swapped

    def holds(self, swapped: Swapped) -> bool:
        """Whether there is room for `swap_in` now."""
        return len(self.lengths) < len(self.births)

    def swap_in(self, swapped: Swapped) -> Slot:
        """A slot for a sequence that was swapped out, as it was. ValueError where there is no room for it."""
        if not self.holds(swapped):
            raise ValueError(f"swap_in: there is no room for a sequence of {swapped.length} tokens")
        slot = self._take_row()
        self.lengths[slot.row] = swapped.length
        self._unpack(slot.row, swapped)
        for kind, entries in self.entries.items():
            entries.write(slot.row, swapped.books[kind])
        if self.saves is not None and swapped.saved is not None:
            self.saves.lengths[slot.row], self.saves.cursor[slot.row] = list(swapped.saved[0]), swapped.saved[1]
        for part, declared in self.fields.items():
            for f in declared:
                places = self._places(part, f, slot.row)
                self.pools[part][f.name].index_copy_(0, places, swapped.tensors[part, f.name].to(self.device))
        return slot

    def check_integrity(self) -> None:
        """AssertionError where tables, lengths and stores contradict each other."""
        for kind, entries in self.entries.items():
            for row in range(len(self.births)):
                stored = None if kind[0] == "memory" and row in self.lengths else self.lengths.get(row, 0)
                entries.check(row, stored)
        if self.saves is not None:
            for row, length in self.lengths.items():
                self.saves.check(row, length)

    def _check(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """ValueError where these sequences cannot take so many tokens more."""
        raise NotImplementedError

    def _tokens(self, arrival: Arrival, counts: Sequence[int], aligned: bool, step: Step) -> dict[Kind, Writing]:
        """Enter the step's tokens into the tables of token fields."""
        raise NotImplementedError

    def _has(self, row: int, length: int) -> bool:
        """Whether token fields still have what a token at place `length` sees."""
        raise NotImplementedError

    def _cut(self, row: int, length: int) -> None:
        """Forget the entries of token fields from place `length` on."""
        raise NotImplementedError

    def _forked(self, row: int, made: int) -> None:
        """Token fields that do not stand in rows."""

    def _closed(self, row: int) -> None:
        """Token fields that do not stand in rows."""

    def _pages(self, kind: Kind, row: int) -> list[int]:
        """Where token fields that do not stand in rows stand."""
        raise NotImplementedError

    def _unpack(self, row: int, swapped: Swapped) -> None:
        """Room for token fields that do not stand in rows."""


def _kind(part: str, declared: tuple[StateField, ...], size: Size | PageSize) -> Kind | None:
    """What the part's entries are indexed by; None where it has sequence fields only."""
    kinds = {size.kind(f) for f in declared if f.per != "sequence"}
    if len(kinds) > 1:
        raise ValueError(f"{part}: token and memory fields of one part must have the same entries, not {sorted(kinds)}")
    return next(iter(kinds), None)
