"""The cache of a server: token fields in pages, taken as sequences grow, shared and used again. Storage, no maths.

Pages with tables and copies on write: Kwon et al. 2023, arXiv 2309.06180, section 4. A page is found again by a hash of
everything before it, so that equal beginnings are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from assay.cache import prefix
from assay.cache.backing import Backing
from assay.cache.groups import Group
from assay.cache.size import Fields, Kind, PageSize
from assay.cache.snapshots import Snapshots
from assay.cache.store import Slot, Store, Swapped
from assay.cache.tables import Arrival, Writing
from assay.ops.step import Step


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """These pages as ranges of pages that follow one another: the first of each, and one past its last."""
    ordered = sorted(pages)
    starts = [i for i, page in enumerate(ordered) if i == 0 or page != ordered[i - 1] + 1]
    for start, end in pairwise([*starts, len(ordered)]):
        yield ordered[start], ordered[end - 1] + 1


@dataclass
class Counts:
    """What `open` was asked and could answer; tokens of prompts, and those of them that were stored already."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0
    hit_tokens: int = 0


class Paged(Store):
    """Pages of declared state: the surface of `Cache`, and room that sequences share.

    One group of pages for all token fields that stay visible equally long; memories and sequence fields have a row for
    each sequence. `settle` after a step's forward gives full pages their names; `open` with a prompt starts from the
    longest beginning of it that every field still has.
    """

    def __init__(
        self,
        fields: Fields,
        size: PageSize,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        backing: Backing | None = None,
    ) -> None:
        super().__init__(fields, size, dtype, device)
        self.size, self.backing = size, backing
        self.format_key = str(dtype)  # how pages are stored: tiers keep apart what differs in it
        tokens = {kind for kind in self.kinds.values() if kind is not None and kind[0] == "token"}
        self.groups = {kind: Group(kind[1] or None, size, self.device) for kind in sorted(tokens)}
        self.snapshots = None if self.saves is None else Snapshots(size.rows * size.saves, size.snapshots)
        self.texts: dict[int, prefix.Text] = {}
        self.counts = Counts()

    @property
    def border(self) -> int | None:
        """Chunks of a prompt must end at multiples of it, at the prompt's end apart, for snapshots; None: anywhere."""
        return self.size.page * self.size.border if self.snapshots is not None and self.size.snapshots else None

    def open(self, tokens: Sequence[int] = (), key: bytes = b"") -> Slot:
        """A row for a new sequence, with the longest beginning of `tokens`, the last apart, that is stored already
        (`length` says how long it is). key: what else a stored state depends on, and who may share it. ValueError when
        all rows are taken."""
        text = prefix.Text(prefix.root(key), plain=not self.entries)
        names = self._known(text.root, tokens) if text.plain else []
        slot, start = self._take_row(), len(names) * self.size.page
        for group in self.groups.values():
            group.attach(slot.row, names)
        if start and self.saves is not None and self.snapshots is not None:
            self._copy_state(self.snapshots.find(names[-1]), self.saves.open(slot.row, start))
        text.tokens, text.names = list(tokens[:start]), names
        self.texts[slot.row], self.lengths[slot.row] = text, start
        self._count(len(tokens), start)
        return slot

    def _known(self, root: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Names of the pages of the longest beginning of which all groups, and a snapshot, are there."""
        names = list(prefix.names(root, tokens[: max(0, len(tokens) - 1)], self.size.page))
        known = self._longest(names)
        if self.backing is not None and known < len(names):
            self.backing.fetch(self, names, known)
            known = self._longest(names)
        return names[:known]

    def _longest(self, names: Sequence[bytes]) -> int:
        """Pages of the longest beginning of these that is all in memory."""
        known = [group.known(names) for group in self.groups.values()]
        if self.snapshots is not None:
            known.append([name in self.snapshots for name in names])
        whole = [all(there) for there in zip(*known, strict=False)]
        return max((i + 1 for i, there in enumerate(whole) if there), default=0)

    def page_tensors(self, kind: Kind, page: int) -> dict[str, Tensor]:
        """What stands in a page, by part and field: views of the stores."""
        own = ((p, f) for p, fields in self.fields.items() if self.kinds[p] == kind for f in fields)
        return {f"{p}.{f.name}": self.pools[p][f.name][page] for p, f in own if f.per == "token"}

    def state_tensors(self, place: int) -> dict[str, Tensor]:
        """The sequence fields at a place, by part and field: views of the stores."""
        own = ((p, f) for p, fields in self.fields.items() for f in fields)
        return {f"{p}.{f.name}": self.pools[p][f.name][place] for p, f in own if f.per == "sequence"}

    def page_from(self, kind: Kind, number: int, record: Mapping[str, Tensor]) -> int:
        """A page, taken, with the contents of the text's page of this number; there must be one available."""
        group = self.groups[kind]
        page, evicted = group.blocks.take()
        if evicted:
            self._clear(kind, [page])
        for name, tensor in self.page_tensors(kind, page).items():
            tensor.copy_(record[name])
        first = number * self.size.page
        group.positions[page] = torch.arange(first, first + self.size.page, device=self.device)
        return page

    def _count(self, tokens: int, reused: int) -> None:
        if tokens:
            self.counts.tokens += tokens
            self.counts.hit_tokens += reused
            self.counts.hits += reused > 0
            self.counts.misses += reused == 0

    def _sequence_pools(self) -> Iterator[Tensor]:
        return (pool for declared, pool in self.tensors() if declared.per == "sequence")

    def _copy_state(self, source: int, target: int) -> None:
        for pool in self._sequence_pools():
            pool[target] = pool[source]

    def _by_pages(self, kind: Kind) -> Iterator[Tensor]:
        """Stores [fields, P, page, ...] that have an entry for every page of this kind."""
        return (stores for shelf, stores in self.shelves.items() if shelf.pages and shelf.kind == kind)

    def _clear(self, kind: Kind, pages: Sequence[int]) -> None:
        """A free page is all zeros: what is not finite must not reach the next sequence."""
        for first, end in runs(pages):
            for stores in self._by_pages(kind):
                stores[:, first:end] = 0

    def fits(self, grow: Sequence[tuple[Slot, int]]) -> bool:
        """Whether all of these sequences can take so many tokens more, all of them at once."""
        return not self._lacking([self._row(slot) for slot, _ in grow], [count for _, count in grow])

    def _lacking(self, rows: Sequence[int], counts: Sequence[int]) -> str:
        """What is missing, in words; empty where there is room."""
        lengths = [self.lengths[row] for row in rows]
        for kind, group in self.groups.items():
            need, available = group.need(rows, lengths, counts), group.blocks.available
            if need > available:
                what = f"with a window of {kind[1]}" if kind[1] else "that stay visible"
                return f"{need} pages more are needed for fields {what}; {available} of {group.blocks.total} are free"
        return ""

    def _check(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        windows = any(group.keep is not None for group in self.groups.values())
        for i, count in enumerate(counts):
            if windows and count > self.size.chunk:
                raise ValueError(
                    f"sequence {i}: {count} new tokens; windows were allocated for {self.size.chunk} at once"
                )
        lacking = self._lacking(rows, counts)
        if lacking:
            raise ValueError(lacking)

    def _tokens(self, arrival: Arrival, counts: Sequence[int], aligned: bool, step: Step) -> dict[Kind, Writing]:
        past = [self.lengths[row] for row in arrival.rows]
        lengths = [length + count for length, count in zip(past, counts, strict=True)]
        made = {}
        for kind, group in self.groups.items():
            moved = group.grow(arrival.rows, past, counts)
            self._clear(kind, moved.clear)
            for source, target in moved.copy:
                self._copy_page(kind, source, target)
            made[kind] = group.write(arrival, lengths, aligned)
        self._note(arrival, step)
        return made

    def _copy_page(self, kind: Kind, source: int, target: int) -> None:
        for stores in self._by_pages(kind):
            stores[:, target] = stores[:, source]
        positions = self.groups[kind].positions
        positions[target] = positions[source]

    def _note(self, arrival: Arrival, step: Step) -> None:
        """The step's tokens enter the texts. Those that are not told apart by their ids make the text not plain."""
        plain = set(step.inputs) == {"ids"} and step.prefix is None and torch.equal(arrival.positions, arrival.index)
        if not plain:
            for row in set(arrival.row.tolist()):
                self.texts[row].plain = False
            return
        for row, _, token in sorted(zip(*torch.stack([arrival.row, arrival.index, arrival.pick(step.ids)]).tolist())):
            self.texts[row].tokens.append(token)

    def settle(self, slots: Sequence[Slot]) -> None:
        """The forward of these sequences' step has succeeded: full pages get their names, and where a sequence stands
        at a border, its state is kept."""
        for slot in slots:
            row = self._row(slot)
            text = self.texts[row]
            if text.plain:
                for number, name in text.settle(self.size.page):
                    self._publish(row, number, name)
                self._keep_state(row, text)

    def _publish(self, row: int, number: int, name: bytes) -> None:
        for kind in self.groups:
            self._enter(kind, row, number, name)

    def _enter(self, kind: Kind, row: int, number: int, name: bytes) -> None:
        """A page of the row gets its name, and goes to the tiers if the name is new."""
        blocks = self.groups[kind].blocks
        new = blocks.find(name) is None
        self._clear(kind, self.groups[kind].publish(row, number, name))
        page = blocks.find(name)
        if self.backing is not None and new and page is not None:
            self.backing.save_page(self, kind, page, name)

    def _keep_state(self, row: int, text: prefix.Text) -> None:
        length = self.lengths[row]
        if self.saves is None or self.snapshots is None or not length or length % (self.size.page * self.size.border):
            return
        place = self.snapshots.take(text.names[-1])
        if place is not None:
            self._copy_state(self.saves.place(row), place)
            if self.backing is not None:
                self.backing.save_state(self, place, text.names[-1])

    def _pages(self, kind: Kind, row: int) -> list[int]:
        return self.groups[kind].tables[row].pages

    def swap_out(self, slot: Slot) -> Swapped:
        row = self._row(slot)
        tables = {kind: group.book(row) for kind, group in self.groups.items()}
        text = self.texts[row].copy()
        return replace(super().swap_out(slot), tables=tables, text=text)

    def holds(self, swapped: Swapped) -> bool:
        room = all(len(book.positions) <= self.groups[kind].blocks.available for kind, book in swapped.tables.items())
        return room and super().holds(swapped)

    def _unpack(self, row: int, swapped: Swapped) -> None:
        assert swapped.text is not None
        for kind, group in self.groups.items():
            group.restore(row, swapped.tables[kind])
        self.texts[row] = swapped.text.copy()

    def swap_in(self, swapped: Swapped) -> Slot:
        slot = super().swap_in(swapped)
        for number, name in enumerate(self.texts[slot.row].names):
            self._publish(slot.row, number, name)
        return slot

    def _forked(self, row: int, made: int) -> None:
        for group in self.groups.values():
            group.fork(row, made)
        self.texts[made] = self.texts[row].copy()

    def _has(self, row: int, length: int) -> bool:
        return all(group.has(row, length) for group in self.groups.values())

    def _cut(self, row: int, length: int) -> None:
        for kind, group in self.groups.items():
            self._clear(kind, group.cut(row, length))
        self.texts[row].cut(length, self.size.page)

    def _closed(self, row: int) -> None:
        for kind, group in self.groups.items():
            self._clear(kind, group.close(row))
        del self.texts[row]

    def check_integrity(self) -> None:
        super().check_integrity()
        for group in self.groups.values():
            group.check(self.lengths)
        if self.snapshots is not None:
            self.snapshots.check()
        for row, text in self.texts.items():
            assert not text.plain or len(text.tokens) == self.lengths[row], f"row {row}: its text has another length"

    def report(self) -> dict[str, Any]:
        """Pages of each group; what `open` was asked for and found; bytes. held: pages that open sequences refer to,
        and their rows. filled: the part of it in which something of theirs stands; fragmentation: the other part."""
        held = filled = snapshot = 0
        counts = {kind: (group.report(), group.filled(self.lengths)) for kind, group in self.groups.items()}
        for shelf, stores in self.shelves.items():
            kind, one = shelf.kind, stores[:, :1].numel() * stores.element_size()
            if shelf.per == "token" and kind is not None:
                held += (counts[kind][0]["used"] or 0) * one
                filled += counts[kind][1] * one // self.size.page
            elif shelf.per == "memory" and kind is not None:
                held += len(self.lengths) * one
                filled += sum(self.entries[kind].high[row] for row in self.lengths) * one // max(kind[1], 1)
            else:
                held, filled = held + len(self.lengths) * self.size.saves * one, filled + len(self.lengths) * one
                snapshot += 0 if self.snapshots is None else len(self.snapshots.places) * one
        return {
            "groups": [told for told, _ in counts.values()],
            **asdict(self.counts),
            "evictions": sum(group.blocks.evictions for group in self.groups.values()),
            "snapshots": 0 if self.snapshots is None else len(self.snapshots.places),
            "snapshot_evictions": 0 if self.snapshots is None else self.snapshots.evictions,
            "snapshot_bytes": snapshot,
            "reserved_bytes": self.reserved_bytes(),
            "held_bytes": held,
            "filled_bytes": filled,
            "fragmentation": 1 - filled / held if held else 0.0,
        }
