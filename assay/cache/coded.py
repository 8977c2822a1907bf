"""Pages of which the older ones are quantised: `Paged` with a format for each field.

A page is quantised when it is full and all of it is older than the residual window (KIVI, Liu et al. 2024, arXiv
2402.02750, section 3.2). It is never written again, and only quantised pages are found by other sequences, so what a
sequence reads of a known beginning does not depend on how far ahead of it another one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from assay.cache.backing import Backing
from assay.cache.formats import Format, Formats
from assay.cache.groups import PageCut
from assay.cache.ledger import PARTS, CodedState, CodedWriting, Ledger, Plan
from assay.cache.paged import Paged
from assay.cache.quantised import Packed, quantise
from assay.cache.shelves import Shelf
from assay.cache.size import Fields, Kind, PageSize, Size
from assay.cache.states import Stored
from assay.cache.store import Seen, Slot, Swapped
from assay.cache.tables import Arrival, Saving, Writing
from assay.ops.state import State
from assay.ops.step import Step
from assay.spec.base import StateField


class Quantised(Paged):
    """`Paged` with `formats`: {"*.k": "int4/channel", "*.v": "int4/token"} with the newest tokens in the model's dtype.

    `formats={"*": "bf16"}` rounds and does not quantise. Lossy: what a sequence answers depends on how its tokens were
    cut into steps, since those of one step see each other whole.
    """

    def __init__(
        self,
        fields: Fields,
        size: PageSize,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        formats: Formats | Mapping[str, str] | None = None,
        backing: Backing | None = None,
    ) -> None:
        self.formats = formats if isinstance(formats, Formats) else Formats(formats or {})
        forms = self.formats.resolve(fields, size)
        self.rounded = {key: getattr(torch, form) for key, form in forms.items() if isinstance(form, str)}
        self.forms = {key: form for key, form in forms.items() if isinstance(form, Format)}
        super().__init__(fields, size, dtype, device, backing)
        self.format_key += f" {sorted((*key, str(form)) for key, form in forms.items())} {self.formats.residual}"
        self.packed = {(part, f.name): self._packed(part, f) for part, f in self._coded_fields()}
        kinds = {kind for part, _ in self.forms if (kind := self.kinds[part]) is not None}
        self.ledgers = {kind: Ledger(self.formats.whole(kind[1] or None, size)) for kind in kinds}

    def _coded_fields(self, kind: Kind | None = None) -> list[tuple[str, StateField]]:
        own = [(part, f) for part, fields in self.fields.items() for f in fields if (part, f.name) in self.forms]
        return own if kind is None else [(part, f) for part, f in own if self.kinds[part] == kind]

    def _shelf(self, part: str, field: StateField, size: Size | PageSize) -> Shelf:
        assert isinstance(size, PageSize)
        shelf = super()._shelf(part, field, size)
        if (part, field.name) in self.forms:  # the pages that stand whole, wherever they belong
            return replace(shelf, pages=False, shape=(self.formats.whole(field.keep, size), size.page, *field.shape))
        return replace(shelf, dtype=self.rounded.get((part, field.name), shelf.dtype))

    def _packed(self, part: str, field: StateField) -> Packed:
        form, page = self.forms[part, field.name], (self.size.page, *field.shape)
        pages = self.size.pages_of(field.keep)
        one = quantise(torch.zeros(page, device=self.device), form, len(page))
        return Packed(*(getattr(one, name).new_zeros((pages, *getattr(one, name).shape)) for name in PARTS))

    def reserved_bytes(self) -> int:
        packed = (getattr(packed, name) for packed in self.packed.values() for name in PARTS)
        return super().reserved_bytes() + sum(t.numel() * t.element_size() for t in packed)

    def _clear(self, kind: Kind, pages: Sequence[int]) -> None:
        super()._clear(kind, pages)
        if kind in self.ledgers:
            self._wipe(kind, self.ledgers[kind].forget(pages))

    def _wipe(self, kind: Kind, places: Sequence[int]) -> None:
        if places:
            index = torch.tensor(places, device=self.device)
            for part, f in self._coded_fields(kind):
                self.pools[part][f.name].index_fill_(0, index, 0)

    def page_tensors(self, kind: Kind, page: int) -> dict[str, Tensor]:
        """As it stands quantised; only such pages have names."""
        coded = {f"{part}.{f.name}" for part, f in self._coded_fields(kind)}
        pools = {p: pools for p, pools in self.pools.items() if self.kinds[p] == kind}
        plain = {f"{p}.{n}": pool for p, pools in pools.items() for n, pool in pools.items()}
        out = {name: pool[page] for name, pool in plain.items() if name not in coded}
        for part, f in self._coded_fields(kind):
            out |= {f"{part}.{f.name}.{n}": getattr(self.packed[part, f.name], n)[page] for n in PARTS}
        return out

    def page_from(self, kind: Kind, number: int, record: Mapping[str, Tensor]) -> int:
        page = super().page_from(kind, number, record)
        if kind in self.ledgers:
            self.ledgers[kind].coded.add(page)
        return page

    def _copy_page(self, kind: Kind, source: int, target: int) -> None:
        super()._copy_page(kind, source, target)
        if kind in self.ledgers:
            ledger = self.ledgers[kind]
            for part, f in self._coded_fields(kind):
                self.pools[part][f.name][ledger.take(target)] = self.pools[part][f.name][ledger.whole[source]]

    def _old(self, kind: Kind, row: int, length: int, alone: bool) -> list[tuple[int, int]]:
        """(number, page) of the row's pages up to `length` that stand whole; `alone`: those of no other row."""
        group, whole = self.groups[kind], self.ledgers[kind].whole
        table = group.tables[row]
        full = enumerate(table.pages[: max(0, length // self.size.page - table.base)], table.base)
        return [(n, page) for n, page in full if page in whole and (not alone or group.blocks.refs[page] == 1)]

    def _code(self, rows: Sequence[int], residual: int, alone: bool = False) -> None:
        """Quantise what is full and older than the residual, and let it be found if its tokens are settled."""
        for kind, ledger in self.ledgers.items():
            old = {row: self._old(kind, row, self.lengths[row] - residual, alone) for row in rows}
            pages = list(dict.fromkeys(page for own in old.values() for _, page in own))
            if pages:
                self._quantise(kind, pages, [ledger.whole[page] for page in pages])
                self._wipe(kind, ledger.code(pages))
            for row, own in old.items():
                names = self.texts[row].names if self.texts[row].plain else []
                for number, _ in own:
                    if number < len(names):
                        self._enter(kind, row, number, names[number])

    def _quantise(self, kind: Kind, pages: Sequence[int], places: Sequence[int]) -> None:
        index, source = torch.tensor(pages, device=self.device), torch.tensor(places, device=self.device)
        for part, f in self._coded_fields(kind):
            pool, packed = self.pools[part][f.name], self.packed[part, f.name]
            made = quantise(pool.index_select(0, source), self.forms[part, f.name], pool.ndim - 1)
            for name in PARTS:
                getattr(packed, name).index_copy_(0, index, getattr(made, name))

    def _check(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        super()._check(rows, counts)
        for i, count in enumerate(counts if self.ledgers else ()):
            if count > self.size.chunk:
                raise ValueError(f"sequence {i}: {count} new tokens; room for {self.size.chunk} at once was allocated")

    def _tokens(self, arrival: Arrival, counts: Sequence[int], aligned: bool, step: Step) -> dict[Kind, Writing]:
        self._code(arrival.rows, self.formats.residual)
        past = [self.lengths[row] for row in arrival.rows]
        made = super()._tokens(arrival, counts, aligned, step)
        for kind in self.ledgers:
            for row, length, count in zip(arrival.rows, past, counts, strict=True):
                self._stand_whole(kind, row, length, count)
            made[kind] = self._planned(kind, made[kind])
        return made

    def _stand_whole(self, kind: Kind, row: int, length: int, count: int) -> None:
        """Places for the pages that `count` new tokens go to."""
        table, page = self.groups[kind].tables[row], self.size.page
        for number in range(length // page, -(-(length + count) // page) if count else 0):
            self.ledgers[kind].take(table.pages[number - table.base])

    def _planned(self, kind: Kind, writing: Writing) -> CodedWriting:
        ledger, cut, page = self.ledgers[kind], writing.cut, self.size.page
        assert isinstance(cut, PageCut)
        pages = cut.table.view(-1).tolist()
        coded = self._pairs([(i, p) for i, p in enumerate(pages) if p in ledger.coded])
        whole = self._pairs([(i, ledger.whole[p]) for i, p in enumerate(pages) if p in ledger.whole])
        written = torch.div(writing.place, page, rounding_mode="floor").tolist()
        place = self._index([ledger.whole[p] for p in written]) * page + writing.place.remainder(page)
        plan = Plan(cut.table.shape[0], len(pages), coded, whole, place)
        return CodedWriting(writing.arrival, writing.place, cut, writing.layout, plan)

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _pairs(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return self._index([a for a, _ in pairs]), self._index([b for _, b in pairs])

    def _state(
        self, part: str, seen: Mapping[Kind, Seen], writing: Mapping[Kind, Writing], saving: Saving | None
    ) -> State:
        plain = super()._state(part, seen, writing, saving)
        forms = {name: form for (own, name), form in self.forms.items() if own == part}
        rounded = frozenset(name for own, name in self.rounded if own == part)
        if not forms and not rounded:
            return plain
        assert isinstance(plain, Stored)
        packed = {name: self.packed[part, name] for name in forms}
        given = (part, plain.pools, plain.layout_key, plain.seen, plain.writing, plain.saving)
        return CodedState(*given, packed, forms, rounded, self.dtype)

    def _publish(self, row: int, number: int, name: bytes) -> None:
        """As soon as the page is quantised."""
        for kind, group in self.groups.items():
            table = group.tables[row]
            there = table.base <= number < table.end
            if kind not in self.ledgers or (there and table.pages[number - table.base] in self.ledgers[kind].coded):
                self._enter(kind, row, number, name)

    def _has(self, row: int, length: int) -> bool:
        """A quantised page is not cut: what is left of it would have to be written again."""
        number = length // self.size.page
        for kind, ledger in self.ledgers.items() if length % self.size.page else ():
            table = self.groups[kind].tables[row]
            if table.base <= number < table.end and table.pages[number - table.base] in ledger.coded:
                return False
        return super()._has(row, length)

    def reach(self, slot: Slot, length: int) -> int:
        border = min(length, self.length(slot)) // self.size.page * self.size.page
        return super().reach(slot, length) or super().reach(slot, border)

    def close(self, slot: Slot) -> None:
        """Its settled pages can be found from now on, all of them quantised."""
        self._code([self._row(slot)], 0, alone=True)
        super().close(slot)

    def _places(self, part: str, declared: StateField, row: int) -> Tensor:
        kind = self.kinds[part]
        if (part, declared.name) not in self.forms or kind is None:
            return super()._places(part, declared, row)
        whole = self.ledgers[kind].whole
        return self._index([whole[page] for page in self._pages(kind, row) if page in whole])

    def swap_out(self, slot: Slot) -> Swapped:
        row, tensors = self._row(slot), dict[tuple[str, str], Tensor]()
        for kind, ledger in self.ledgers.items():
            pages = self._pages(kind, row)
            tensors["", str(kind)] = torch.tensor([page in ledger.coded for page in pages])
            index = self._index([page for page in pages if page in ledger.coded])
            for part, f in self._coded_fields(kind):
                for name in PARTS:
                    value = getattr(self.packed[part, f.name], name)
                    tensors[part, f"{f.name}.{name}"] = value.index_select(0, index).cpu()
        swapped = super().swap_out(slot)
        return replace(swapped, tensors=swapped.tensors | tensors)

    def _unpack(self, row: int, swapped: Swapped) -> None:
        super()._unpack(row, swapped)
        for kind, ledger in self.ledgers.items():
            pages, coded = self._pages(kind, row), swapped.tensors["", str(kind)].tolist()
            self._wipe(kind, ledger.forget(pages))
            ledger.coded.update(page for page, is_coded in zip(pages, coded, strict=True) if is_coded)
            for page in pages:
                if page not in ledger.coded:
                    ledger.take(page)
            index = self._index([page for page in pages if page in ledger.coded])
            for part, f in self._coded_fields(kind):
                for name in PARTS:
                    value = swapped.tensors[part, f"{f.name}.{name}"].to(self.device)
                    getattr(self.packed[part, f.name], name).index_copy_(0, index, value)

    def fitted(self, plain: Swapped) -> Swapped:
        """A sequence that a cache without formats stored, as it would stand here: what is older than the residual is
        quantised, what has another dtype is rounded."""
        tensors = dict(plain.tensors)
        for kind, book in plain.tables.items():
            if kind in self.ledgers:
                old = max(0, (plain.length - self.formats.residual) // self.size.page - book.base)
                coded = torch.arange(len(book.positions)) < old
                tensors["", str(kind)] = coded
                for part, f in self._coded_fields(kind):
                    pages = tensors[part, f.name]
                    made = quantise(pages[coded], self.forms[part, f.name], pages.ndim - 1)
                    tensors |= {(part, f"{f.name}.{name}"): getattr(made, name) for name in PARTS}
                    tensors[part, f.name] = pages[~coded]
        rounded = {key: tensors[key].to(dtype) for key, dtype in self.rounded.items()}
        return replace(plain, tensors=tensors | rounded)

    def check_integrity(self) -> None:
        super().check_integrity()
        for kind, ledger in self.ledgers.items():
            blocks = self.groups[kind].blocks
            ledger.check()
            used = {page for page, count in enumerate(blocks.refs) if count}
            assert ledger.whole.keys() <= used <= ledger.whole.keys() | ledger.coded, "a page stands nowhere"
            assert ledger.coded == (used - ledger.whole.keys()) | set(blocks.cached), "quantised pages are not those"
            assert not any(blocks.names[page] for page in ledger.whole), "a page that stands whole can be found"

    def report(self) -> dict[str, Any]:
        """`Paged.report`, of what stands quantised the bytes that it takes."""
        told = super().report()
        told["quantised_pages"] = told["whole_pages"] = 0
        for kind, ledger in self.ledgers.items():
            used = sum(count > 0 for count in self.groups[kind].blocks.refs)
            told["quantised_pages"] += used - len(ledger.whole)
            told["whole_pages"] += len(ledger.whole)
            for part, f in self._coded_fields(kind):
                pool, form = self.pools[part][f.name], self.forms[part, f.name]
                less = pool[:1].numel() * pool.element_size() - form.bytes(tuple(pool.shape[1:]))
                told["held_bytes"] -= less * (used - len(ledger.whole))
                told["filled_bytes"] -= less * (used - len(ledger.whole))
        told["fragmentation"] = 1 - told["filled_bytes"] / told["held_bytes"] if told["held_bytes"] else 0.0
        return told
