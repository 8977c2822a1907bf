"""The cache of a static batch: a row for each sequence, allocated at once. Storage and no maths.

What a part declares (`StateField`) decides the store: token fields that stay visible stand one after another, those
with `keep` in a ring, memory fields are written once, sequence fields keep one state and, if asked, earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.cache.size import Fields, Size
from assay.cache.states import Stored
from assay.cache.tables import Arrival, Cut, Entries, Saves, Saving, Writing, one_a_row
from assay.ops.state import State, dtype_of
from assay.ops.step import Layout, Step
from assay.spec.base import StateField

Kind = tuple[str, int]  # ("token", capacity) or ("memory", capacity): parts of one kind share a layout


@dataclass(frozen=True)
class Slot:
    """A sequence that is open; it is void once closed, also when its row is used again."""

    row: int
    birth: int


class Cache:
    """Rows of declared state.

    `open` a slot, `begin` a step with the slots of its sequences (number i of the step is `slots[i]`), run the model
    with what it returns. `rewind` forgets the end of a sequence, `fork` copies one, `close` gives the row back.
    """

    def __init__(self, fields: Fields, size: Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.fields, self.size, self.dtype, self.device = dict(fields), size, dtype, torch.device(device)
        self.kinds = {part: _kind(part, declared, size) for part, declared in fields.items()}
        self.pools = {part: {f.name: self._pool(f) for f in declared} for part, declared in fields.items()}
        self.entries: dict[Kind, Entries] = {}
        for part, kind in self.kinds.items():
            if kind is not None and kind not in self.entries:
                keep = next(f.keep for f in fields[part] if f.per == kind[0])
                keep = keep if kind[1] < size.tokens else None
                self.entries[kind] = Entries(size.rows, kind[1], keep, self.device)
        sequential = any(f.per == "sequence" for declared in fields.values() for f in declared)
        self.saves = Saves(size.rows, size.saves, self.device) if sequential else None
        self.lengths: dict[int, int] = {}  # tokens of each open row
        self.births = [0] * size.rows

    def _pool(self, field: StateField) -> Tensor:
        """Zeros rather than empty: entries that nobody sees are multiplied by 0, and must be finite."""
        if field.per == "sequence":
            shape: tuple[int, ...] = (self.size.rows * self.size.saves,)
        else:
            shape = (self.size.rows, self.size.capacity(field))
        return torch.zeros((*shape, *field.shape), dtype=dtype_of(field, self.dtype), device=self.device)

    def tensors(self) -> list[tuple[StateField, Tensor]]:
        return [(f, self.pools[part][f.name]) for part, declared in self.fields.items() for f in declared]

    def reserved_bytes(self) -> int:
        """Bytes of the stored fields as allocated; the tables that all layers share are not counted."""
        return sum(pool.numel() * pool.element_size() for _, pool in self.tensors())

    def used_bytes(self) -> int:
        """Bytes that the open sequences can still read, by the fields' own declaration."""
        width, total = str(self.dtype).removeprefix("torch."), 0
        for row, length in self.lengths.items():
            memory = max((e.high[row] for kind, e in self.entries.items() if kind[0] == "memory"), default=0)
            total += sum(f.bytes(length, width, memory) for declared in self.fields.values() for f in declared)
        return total

    def open(self) -> Slot:
        """A row for a new sequence. ValueError when all are taken."""
        free = next((row for row in range(self.size.rows) if row not in self.lengths), None)
        if free is None:
            raise ValueError(f"no free row: all {self.size.rows} of this cache are open")
        self.lengths[free] = 0
        self._start(free)
        return Slot(free, self.births[free])

    def _start(self, row: int) -> None:
        """Sequence fields of the row at their initial values."""
        if self.saves is not None:
            place = self.saves.open(row)
            for field, pool in self.tensors():
                if field.per == "sequence":
                    pool[place] = field.init

    def _row(self, slot: Slot) -> int:
        if slot.row not in self.lengths or self.births[slot.row] != slot.birth:
            raise ValueError(f"slot {slot} is closed")
        return slot.row

    def length(self, slot: Slot) -> int:
        return self.lengths[self._row(slot)]

    def begin(self, slots: Sequence[Slot], step: Step) -> dict[str, State]:
        """The state of every part for this step. All tables are brought up to date here, once; parts only write."""
        rows = tuple(self._row(slot) for slot in slots)
        counts = self._counts(rows, step)
        arrival = Arrival.of(rows, step.seq, step.index, step.positions, sum(counts))
        aligned = one_a_row(step, len(rows))
        seen: dict[Kind, tuple[Cut, Layout]] = {}
        writing: dict[Kind, Writing] = {}
        for kind, entries in self.entries.items():
            made = (
                entries.arrive(arrival, counts, aligned)
                if kind[0] == "token"
                else self._memorise(kind, rows, step, aligned)
            )
            if made is not None:
                writing[kind] = made
            seen[kind] = (made.cut, made.layout) if made is not None else entries.seen(rows, aligned)
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        saving = self.saves.arrive(rows, step, [self.lengths[row] for row in rows]) if self.saves is not None else None
        return {part: self._state(part, seen, writing, saving) for part in self.fields}

    def _state(
        self, part: str, seen: dict[Kind, tuple[Cut, Layout]], writing: dict[Kind, Writing], saving: Saving | None
    ) -> State:
        kind = self.kinds[part]
        if kind is None:
            return Stored(part, self.pools[part], None, None, None, saving)
        return Stored(part, self.pools[part], kind, seen[kind], writing.get(kind), saving)

    def _counts(self, rows: tuple[int, ...], step: Step) -> list[int]:
        """New tokens of each sequence. ValueError when the step does not continue what is stored or does not fit."""
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
        for i, (row, past, count) in enumerate(zip(rows, step.past.tolist(), counts, strict=True)):
            if past != self.lengths[row]:
                raise ValueError(
                    f"sequence {i}: the step continues after {past} tokens, but {self.lengths[row]} are stored"
                )
            if past + count > self.size.tokens:
                raise ValueError(f"sequence {i}: {past + count} tokens; this cache holds {self.size.tokens}")
            if count > self.size.chunk and any(e.keep is not None for e in self.entries.values()):
                raise ValueError(
                    f"sequence {i}: {count} new tokens; windows were allocated for {self.size.chunk} at once"
                )
        return counts

    def _memorise(self, kind: Kind, rows: tuple[int, ...], step: Step, aligned: bool) -> Writing | None:
        """Room for the memory that this step brings; it replaces what its sequences had."""
        source = step.memory or step.encode
        if source is None:
            return None
        entries = self.entries[kind]
        counts = torch.bincount(source.seq[source.seq >= 0], minlength=len(rows)).tolist()
        if len(counts) != len(rows) or max(counts) > kind[1]:
            raise ValueError(
                f"a memory of {max(counts)} tokens for {len(counts)} sequences; {kind[1]} for {len(rows)} fit"
            )
        for row, count in zip(rows, counts, strict=True):
            if count:
                entries.rewind(row, 0)
        return entries.arrive(Arrival.of(rows, source.seq, source.index, source.index, sum(counts)), counts, aligned)

    def fork(self, slot: Slot) -> Slot:
        """A new slot with a copy of everything that this one has stored."""
        row, made = self._row(slot), self.open()
        self.lengths[made.row] = self.lengths[row]
        for field, pool in self.tensors():
            if field.per == "sequence":
                depth = self.size.saves
                pool[made.row * depth : (made.row + 1) * depth] = pool[row * depth : (row + 1) * depth]
            else:
                pool[made.row] = pool[row]
        for entries in self.entries.values():
            entries.copy(row, made.row)
        if self.saves is not None:
            self.saves.copy(row, made.row)
        return made

    def reach(self, slot: Slot, length: int) -> int:
        """The longest length up to `length` that `rewind` can go back to: rings have overwritten old entries, and
        sequence fields stand at their saved lengths only. 0 always can."""
        row = self._row(slot)
        at = min(length, self.lengths[row])
        saved = [at] if self.saves is None else [n for n in self.saves.lengths[row] if n is not None and n <= at]
        tables = [e for kind, e in self.entries.items() if kind[0] == "token"]
        return max((n for n in saved if all(t.has(row, n) for t in tables)), default=0)

    def rewind(self, slot: Slot, length: int) -> None:
        """Forget every token from place `length` on. A memory stays. ValueError for a length that is out of reach."""
        row = self._row(slot)
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"rewind to {length}: the sequence has {self.lengths[row]} tokens")
        if self.reach(slot, length) != length:
            raise ValueError(
                f"rewind to {length}: no longer stored; the nearest before it is {self.reach(slot, length)}"
            )
        for kind, entries in self.entries.items():
            if kind[0] == "token":
                entries.rewind(row, length)
        if length == 0:
            self._start(row)
        elif self.saves is not None:
            self.saves.rewind(row, length)
        self.lengths[row] = length

    def close(self, slot: Slot) -> None:
        """Give the row back, cleared: values that are not finite must not reach the next sequence."""
        row = self._row(slot)
        for field, pool in self.tensors():
            if field.per != "sequence":
                pool[row].zero_()
        for entries in self.entries.values():
            entries.rewind(row, 0)
        del self.lengths[row]
        self.births[row] += 1

    def check_integrity(self) -> None:
        """AssertionError where tables, lengths and stores contradict each other."""
        for kind, entries in self.entries.items():
            for row in range(self.size.rows):
                stored = None if kind[0] == "memory" and row in self.lengths else self.lengths.get(row, 0)
                entries.check(row, stored)
        if self.saves is not None:
            for row, length in self.lengths.items():
                self.saves.check(row, length)


def _kind(part: str, declared: tuple[StateField, ...], size: Size) -> Kind | None:
    """What the part's entries are indexed by; None where it has sequence fields only."""
    kinds = {(f.per, size.capacity(f)) for f in declared if f.per != "sequence"}
    if len(kinds) > 1:
        raise ValueError(f"{part}: token and memory fields of one part must have the same entries, not {sorted(kinds)}")
    return next(iter(kinds), None)
