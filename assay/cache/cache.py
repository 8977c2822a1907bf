"""The cache of a static batch: a row for each sequence, allocated at once. Storage and no maths.

What a part declares (`StateField`) decides the store: token fields that stay visible stand one after another, those
with `keep` in a ring, memory fields are written once, sequence fields keep one state and, if asked, earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from assay.cache.size import Fields, Kind, Size
from assay.cache.store import Slot, Store
from assay.cache.tables import Arrival, Entries, Writing
from assay.ops.step import Step


class Cache(Store):
    """Rows of declared state.

    `open` a slot, `begin` a step with the slots of its sequences (number i of the step is `slots[i]`), run the model
    with what it returns. `rewind` forgets the end of a sequence, `fork` copies one, `close` gives the row back.
    """

    border: int | None = None  # where chunks of a prompt must end: anywhere

    def __init__(self, fields: Fields, size: Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__(fields, size, dtype, device)
        self.size = size
        for part, kind in self.kinds.items():
            if kind is not None and kind not in self.entries:
                keep = next(f.keep for f in fields[part] if f.per == kind[0])
                keep = keep if kind[1] < size.tokens else None
                self.entries[kind] = Entries(size.rows, kind[1], keep, self.device)

    @property
    def _tables(self) -> dict[Kind, Entries]:
        return {kind: entries for kind, entries in self.entries.items() if kind[0] == "token"}

    def open(self, tokens: Sequence[int] = (), key: bytes = b"") -> Slot:
        """A row for a new sequence. ValueError when all are taken. Of `tokens` nothing is ever stored already."""
        return self._take_row()

    def report(self) -> dict[str, Any]:
        return {"reserved_bytes": self.reserved_bytes(), "used_bytes": self.used_bytes()}

    def fits(self, grow: Sequence[tuple[Slot, int]]) -> bool:
        """Whether all of these sequences can take so many tokens more."""
        return all(self.length(slot) + count <= self.size.tokens for slot, count in grow)

    def _check(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            past = self.lengths[row]
            if past + count > self.size.tokens:
                raise ValueError(f"sequence {i}: {past + count} tokens; this cache holds {self.size.tokens}")
            if count > self.size.chunk and any(e.keep is not None for e in self.entries.values()):
                raise ValueError(
                    f"sequence {i}: {count} new tokens; windows were allocated for {self.size.chunk} at once"
                )

    def _tokens(self, arrival: Arrival, counts: Sequence[int], aligned: bool, step: Step) -> dict[Kind, Writing]:
        return {kind: entries.arrive(arrival, counts, aligned) for kind, entries in self._tables.items()}

    def _has(self, row: int, length: int) -> bool:
        return all(entries.has(row, length) for entries in self._tables.values())

    def _cut(self, row: int, length: int) -> None:
        for entries in self._tables.values():
            entries.rewind(row, length)
