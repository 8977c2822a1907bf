"""Which pages of a group are quantised, where the others stand, and one part's memory during a step over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from assay.cache.formats import Format
from assay.cache.quantised import Packed, dequantise
from assay.cache.states import Stored
from assay.cache.tables import Writing
from assay.ops.step import Step, View
from assay.ops.tape import LIVE

PARTS = ("codes", "scale", "zero")


class Ledger:
    """Which pages of a group are quantised, and in which places the others stand whole. No tensors."""

    def __init__(self, places: int) -> None:
        self.total, self.free = places, list(range(places))[::-1]
        self.whole: dict[int, int] = {}  # page -> place
        self.coded: set[int] = set()

    def take(self, page: int) -> int:
        assert page not in self.coded, f"page {page} is quantised and would be written"
        if page not in self.whole:
            self.whole[page] = self.free.pop()
        return self.whole[page]

    def code(self, pages: Iterable[int]) -> list[int]:
        """These are quantised now; the places that they leave."""
        left = [self.whole.pop(page) for page in pages]
        self.coded.update(pages)
        self.free += left
        return left

    def forget(self, pages: Iterable[int]) -> list[int]:
        """Nobody has these any more; the places that they leave."""
        left = [self.whole.pop(page) for page in pages if page in self.whole]
        self.coded.difference_update(pages)
        self.free += left
        return left

    def check(self) -> None:
        places = [*self.free, *self.whole.values()]
        assert sorted(places) == list(range(self.total)), "places of whole pages are lost"
        assert not self.whole.keys() & self.coded, "a page is both whole and quantised"


@dataclass(frozen=True)
class Plan:
    """What a step reads and writes of a group's fields: among `pages` pages of `rows` sequences, which are quantised
    and which stand whole, and where; the places of the new tokens among the whole ones."""

    rows: int
    pages: int
    coded: tuple[Int[Tensor, "c"], Int[Tensor, "c"]]  # number among the pages, page
    whole: tuple[Int[Tensor, "w"], Int[Tensor, "w"]]  # number among the pages, place
    place: Int[Tensor, "n"]

    def read(self, pool: Tensor, packed: Packed, form: Format) -> Tensor:
        """[B, S, ...] in the pool's dtype; pages that are neither are free ones, and 0."""
        out, dims = pool.new_zeros((self.pages, *pool.shape[1:])), pool.ndim - 1
        if len(self.coded[0]):
            chosen = Packed(*(getattr(packed, name).index_select(0, self.coded[1]) for name in PARTS))
            out.index_copy_(0, self.coded[0], dequantise(chosen, form, pool.shape[-1], pool.dtype, dims))
        if len(self.whole[0]):
            out.index_copy_(0, self.whole[0], pool.index_select(0, self.whole[1]))
        return out.view(self.rows, -1, *pool.shape[2:])


@dataclass(frozen=True)
class CodedWriting(Writing):
    plan: Plan


@dataclass(frozen=True)
class CodedState(Stored):
    """The state of a part some of whose fields have a format; those that are `rounded` are read in `dtype`."""

    packed: Mapping[str, Packed] = field(metadata=LIVE)
    forms: Mapping[str, Format]
    rounded: frozenset[str]
    dtype: torch.dtype

    def append(self, step: Step, **new: Tensor) -> View:
        own = {name: value for name, value in new.items() if name in self.forms}
        view = super().append(step, **{name: value for name, value in new.items() if name not in own})
        fields = {name: t.to(self.dtype) if name in self.rounded else t for name, t in view.fields.items()}
        for name, value in own.items():
            pool, writing = self.pools[name], self.writing
            assert isinstance(writing, CodedWriting)
            value = writing.arrival.pick(value.detach()).to(pool.dtype)
            pool.flatten(0, 1).index_copy_(0, writing.plan.place, value)
            fields[name] = writing.plan.read(pool, self.packed[name], self.forms[name])
        return View(fields, view.layout)
