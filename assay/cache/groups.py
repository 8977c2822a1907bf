"""The pages of all token fields that stay visible equally long: which sequence has which, and what a step sees of them.

Legend: P pages of the group, B sequences of the step, S entries of a view, n tokens that are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from assay.cache.blocks import Blocks
from assay.cache.size import PageSize
from assay.cache.tables import ROUND, Arrival, Writing
from assay.ops.step import InPages, Layout


@dataclass
class Table:
    """The pages of one sequence, from its page number `base` on; what a window no longer shows is given back."""

    base: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.base + len(self.pages)

    def drop(self, before: int) -> list[int]:
        """Leave out the pages below this number."""
        out = self.pages[: max(0, before - self.base)]
        self.pages, self.base = self.pages[len(out) :], self.base + len(out)
        return out


@dataclass(frozen=True)
class PageCut:
    """The pages that a step reads, as many of each of its sequences: a run of pages (a slice of the store itself), or
    picked ones (a copy, if they are asked for by name)."""

    table: Int[Tensor, "B _"]
    run: tuple[int, int] | None  # its first page, and one past its last

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], device: torch.device) -> PageCut:
        pages = [page for row in rows for page in row]
        first, end = pages[0], pages[0] + len(pages)
        run = (first, end) if pages[-1] == end - 1 and pages == list(range(first, end)) else None
        return cls(torch.tensor(pages, dtype=torch.long, device=device).view(len(rows), -1), run)

    def of(self, pool: Tensor) -> Tensor:
        """[P, page, ...] to [B, S, ...]."""
        chosen = pool.index_select(0, self.table.view(-1)) if self.run is None else pool[self.run[0] : self.run[1]]
        return chosen.view(self.table.shape[0], -1, *pool.shape[2:])

    def fields(self, pools: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return InPages(pools, self.table) if self.run is None else {n: self.of(pool) for n, pool in pools.items()}


@dataclass(frozen=True)
class PageBook:
    """Which pages of its text a sequence has: from page number `base` on, and the positions of their entries."""

    base: int
    positions: Int[Tensor, "_ page"]


@dataclass(frozen=True)
class Moved:
    """What must happen to the stored values before a step writes: pages to clear, then (from, to) pages to copy."""

    clear: list[int]
    copy: list[tuple[int, int]]


class Group:
    """Pages of fields with equal `keep`: a page's number is valid for all of them, in every layer."""

    def __init__(self, keep: int | None, size: PageSize, device: torch.device) -> None:
        self.keep, self.page, self.chunk = keep, size.page, size.chunk
        self.span = None if keep is None else size.span(keep)
        self.blocks = Blocks(size.pages_of(keep))
        self.positions = torch.zeros(self.blocks.total, size.page, dtype=torch.long, device=device)
        self.tables: dict[int, Table] = {}

    def first(self, length: int) -> int:
        """The first page that a token at place `length` sees."""
        return 0 if self.keep is None else max(0, length - self.keep + 1) // self.page

    def need(self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> int:
        """How many pages more must be available before each sequence takes that many tokens more, in as many steps as
        that needs; below 0: it gives some back. For one step it is exactly what `grow` does."""
        grown = [(self.tables[r], n, n + c) for r, n, c in zip(rows, lengths, counts, strict=True) if c]
        dropped, taken = Counter[int](), 0
        for table, _, length in grown:
            dropped.update(table.pages[: max(0, self._kept(length) - table.base)])
        taken -= sum(count == self.blocks.refs[page] for page, count in dropped.items())
        for table, past, length in grown:
            kept = max(0, self._kept(length) - table.base)
            new = -(-length // self.page) - table.end
            taken += new if self.span is None else min(new, self.span - len(table.pages[kept:]))
            last = table.pages[-1] if past % self.page and table.pages[kept:] else None
            if last is not None and self.blocks.refs[last] - dropped[last] > 1:
                dropped[last] += 1
                taken += 1
        return taken

    def _kept(self, length: int) -> int:
        """The first page that is kept at this length: as in a ring, `chunk` tokens can be taken back again."""
        return 0 if self.keep is None else self.first(max(0, length - self.chunk))

    def grow(self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Moved:
        """Pages for the new tokens of each sequence, none of them shared or under a name."""
        moved = Moved([], [])
        for row, length, count in zip(rows, lengths, counts, strict=True):
            if count:
                dropped = self.tables[row].drop(self._kept(length + count))
                moved.clear.extend(page for page in dropped if self.blocks.drop(page))
        for row, length, count in zip(rows, lengths, counts, strict=True):
            table = self.tables[row]
            if count and length % self.page:
                self._own(table, moved)
            for _ in range(-(-(length + count) // self.page) - table.end if count else 0):
                self._take(table.pages, moved)
        return moved

    def _own(self, table: Table, moved: Moved) -> None:
        """Before its last page is written: a copy if others refer to it, and no name, which would promise more."""
        last = table.pages[-1]
        if self.blocks.refs[last] == 1:
            self.blocks.rename(last)
            return
        table.pages.pop()
        moved.copy.append((last, self._take(table.pages, moved)))
        self.blocks.drop(last)

    def _take(self, pages: list[int], moved: Moved) -> int:
        page, evicted = self.blocks.take(pages[-1] + 1 if pages else None)
        if evicted:
            moved.clear.append(page)
        pages.append(page)
        return page

    def write(self, arrival: Arrival, lengths: Sequence[int], aligned: bool) -> Writing:
        """Enter the step's tokens; `lengths[i]`: tokens of its sequence i, with them."""
        cut = PageCut.of_rows(self._padded(arrival.rows), self.positions.device)
        base = torch.tensor([self.tables[row].base for row in arrival.rows], device=self.positions.device)
        entry = arrival.index - base.index_select(0, arrival.seq) * self.page
        pages = cut.table[arrival.seq, torch.div(entry, self.page, rounding_mode="floor")]
        place = pages * self.page + entry.remainder(self.page)
        self.positions.view(-1).index_copy_(0, place, arrival.positions)
        return Writing(arrival, place, cut, self._layout(cut, base, lengths, aligned))

    def _layout(self, cut: PageCut, base: Tensor, lengths: Sequence[int], aligned: bool) -> Layout:
        positions = cut.of(self.positions)
        index = base[:, None] * self.page + torch.arange(positions.shape[1], device=base.device)
        there = index < torch.tensor(lengths, device=base.device)[:, None]
        own = torch.arange(base.shape[0], device=base.device)[:, None]
        return Layout(torch.where(there, own, -1), torch.where(there, index, -1), positions, aligned)

    def _padded(self, rows: Sequence[int]) -> list[list[int]]:
        """The pages of each row, as many for all of them: views grow by `ROUND` entries, so that shapes change seldom.
        What is added is the free pages behind, all zeros, so that a run stays one; or else a page of the row's own."""
        grow, most = max(1, ROUND // self.page), max(1, *(len(self.tables[row].pages) for row in rows), 1)
        count, out = min(-(-most // grow) * grow, self.blocks.total), []
        for row in rows:
            pages = self.tables[row].pages or [0]
            behind = range(pages[-1] + 1, pages[-1] + 1 + count - len(pages))
            free = all(page in self.blocks.free for page in behind)
            out.append([*pages, *(behind if free else pages[:1] * len(behind))])
        return out

    def has(self, row: int, length: int) -> bool:
        """Whether the row can be cut back to `length`: every page that a token there would see is still there."""
        return length == 0 or self.tables[row].base <= self.first(length)

    def cut(self, row: int, length: int) -> list[int]:
        """Forget the entries from place `length` on; the pages that nobody has any more."""
        table = self.tables[row]
        kept = max(0, -(-length // self.page) - table.base)
        out, table.pages = table.pages[kept:], table.pages[:kept]
        if not length:
            table.base = 0
        return self.blocks.drop_all(out)

    def publish(self, row: int, number: int, name: bytes) -> list[int]:
        """Name the row's full page of this number, if it is still there; the pages that nobody has any more, because
        an equal one was known."""
        table = self.tables[row]
        if not table.base <= number < table.end:
            return []
        page = table.pages[number - table.base]
        table.pages[number - table.base] = kept = self.blocks.publish(page, name)
        return self.blocks.drop_all([page]) if kept != page else []

    def known(self, names: Sequence[bytes]) -> list[bool]:
        """For each number of whole pages, from one on: whether a token behind them would find all that it sees."""
        known, run = list[bool](), 0
        for count, name in enumerate(names, 1):
            run = run + 1 if self.blocks.find(name) is not None else 0
            known.append(count - run <= self.first(count * self.page))
        return known

    def attach(self, row: int, names: Sequence[bytes]) -> None:
        """Open a row with these known pages, as far as a token behind them sees."""
        base = self.first(len(names) * self.page)
        found = [self.blocks.find(name) for name in names[base:]]
        pages = [page for page in found if page is not None]
        assert len(pages) == len(names) - base, "pages that are not known"
        for page in pages:
            self.blocks.share(page)
        self.tables[row] = Table(base, pages)

    def book(self, row: int) -> PageBook:
        table = self.tables[row]
        pages = torch.tensor(table.pages, dtype=torch.long, device=self.positions.device)
        return PageBook(table.base, self.positions.index_select(0, pages).cpu())

    def restore(self, row: int, book: PageBook) -> None:
        """Open a row with pages of its own for what the book says."""
        table = self.tables[row] = Table(book.base)
        for positions in book.positions:
            self._take(table.pages, Moved([], []))
            self.positions[table.pages[-1]] = positions.to(self.positions.device)

    def filled(self, lengths: Mapping[int, int]) -> int:
        """Entries of referenced pages in which a token stands, shared ones counted once."""
        most: dict[int, int] = {}
        for row, table in self.tables.items():
            for number, page in enumerate(table.pages, table.base):
                most[page] = max(most.get(page, 0), min(self.page, lengths[row] - number * self.page))
        return sum(most.values())

    def report(self) -> dict[str, int | None]:
        blocks, free, cached = self.blocks, len(self.blocks.free), len(self.blocks.cached)
        used = sum(map(bool, blocks.refs))  # counted, not what is left: the three make the whole only if none is lost
        return {
            "keep": self.keep,
            "pages": blocks.total,
            "used": used,
            "free": free,
            "cached": cached,
            "evictions": blocks.evictions,
        }

    def fork(self, row: int, made: int) -> None:
        """The same pages, each with one reference more."""
        table = self.tables[row]
        self.tables[made] = Table(table.base, list(table.pages))
        for page in table.pages:
            self.blocks.share(page)

    def close(self, row: int) -> list[int]:
        """The pages that nobody has any more."""
        return self.blocks.drop_all(self.tables.pop(row).pages)

    def check(self, lengths: Mapping[int, int]) -> None:
        """Tables hold what their sequences' lengths ask for, and the pages' references are theirs."""
        assert self.tables.keys() == lengths.keys(), "tables of rows that are not open"
        references: Iterable[int] = [page for table in self.tables.values() for page in table.pages]
        self.blocks.check(references)
        for row, table in self.tables.items():
            length = lengths[row]
            assert table.end == -(-length // self.page), f"row {row}: pages up to {table.end} for {length} tokens"
            assert len(set(table.pages)) == len(table.pages), f"row {row}: a page stands twice"
            assert self.has(row, length), f"row {row}: its window is not there"
