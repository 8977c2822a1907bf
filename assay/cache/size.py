"""How many bytes a cache takes, from the declared state alone. Allocates nothing and imports no torch."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from assay.spec.base import StateField

Fields = Mapping[str, tuple[StateField, ...]]
Kind = tuple[str, int]  # ("token", ...) or ("memory", capacity): parts of one kind share a layout


def _at_least(what: str, size: Size | PageSize, least: Mapping[str, int]) -> None:
    for name, low in least.items():
        if getattr(size, name) < low:
            raise ValueError(f"{what} size: {name} is {getattr(size, name)}; accepted: {low} or more")


def _one_a_token(field: StateField) -> None:
    if field.every != 1:
        raise ValueError(f"state field {field.name}: every={field.every}; this cache keeps one entry a token")


@dataclass(frozen=True)
class Size:
    """What a cache has room for.

    rows: sequences. tokens: of each. chunk: the longest run of tokens that one step brings to a sequence; a window
    keeps `chunk - 1` entries more than it shows, so that the first query of the run still sees all of its window.
    memory: tokens of the memory (cross-attention). saves: states of a sequence field that are kept, the current one
    and those that `rewind` can go back to.
    """

    rows: int
    tokens: int
    chunk: int = 1
    memory: int = 0
    saves: int = 1

    def __post_init__(self) -> None:
        _at_least("cache", self, {"rows": 1, "tokens": 1, "chunk": 1, "memory": 0, "saves": 1})

    def capacity(self, field: StateField) -> int:
        """Entries of a row that are allocated for a token or memory field."""
        _one_a_token(field)
        if field.per == "memory":
            return self.memory
        return self.tokens if field.keep is None else min(self.tokens, field.keep + self.chunk - 1)

    def kind(self, field: StateField) -> Kind:
        return field.per, self.capacity(field)

    def shape(self, field: StateField) -> tuple[int, ...]:
        """What stands before a field's own shape in its store."""
        return (self.rows * self.saves,) if field.per == "sequence" else (self.rows, self.capacity(field))

    def stored(self, field: StateField) -> int:
        """Entries that can be read when every row is full."""
        return self.rows * field.entries(self.tokens, self.memory)


@dataclass(frozen=True)
class PageSize:
    """What a cache in pages has room for.

    rows: sequences that are open at once. page: tokens of a page. pages: of all sequences together, for token fields
    that stay visible; fields with a window get what `rows` sequences need of them, whatever their length, and `tails`
    pages more, in which the ends of known beginnings wait to be used again. chunk, memory, saves: as in `Size`.
    snapshots: states of all sequence fields at page borders, `border` pages apart, kept for sequences that begin alike.
    """

    rows: int
    page: int
    pages: int
    chunk: int = 1
    memory: int = 0
    saves: int = 1
    tails: int = 0
    snapshots: int = 0
    border: int = 1

    def __post_init__(self) -> None:
        least = {"rows": 1, "page": 1, "pages": 1, "chunk": 1, "memory": 0, "saves": 1, "tails": 0, "snapshots": 0}
        _at_least("paged cache", self, {**least, "border": 1})

    @property
    def tokens(self) -> int:
        """The longest sequence, if it is alone."""
        return self.page * self.pages

    def span(self, keep: int) -> int:
        """The most pages of one sequence that a window of `keep` tokens needs: `keep + chunk - 1` entries, which may
        begin and end inside a page."""
        return (keep + self.chunk - 3) // self.page + 2 if keep + self.chunk > 2 else 1

    def pages_of(self, keep: int | None) -> int:
        return self.pages if keep is None else min(self.pages, self.rows * self.span(keep) + self.tails)

    def capacity(self, field: StateField) -> int:
        """Entries of a row of a memory field: whole pages."""
        return -(-self.memory // self.page) * self.page

    def kind(self, field: StateField) -> Kind:
        _one_a_token(field)
        return ("memory", self.capacity(field)) if field.per == "memory" else ("token", field.keep or 0)

    def shape(self, field: StateField) -> tuple[int, ...]:
        if field.per == "sequence":
            return (self.rows * self.saves + self.snapshots,)
        return (self.rows, self.capacity(field)) if field.per == "memory" else (self.pages_of(field.keep), self.page)

    def stored(self, field: StateField) -> int:
        if field.per != "token":
            return self.rows * field.entries(self.tokens, self.memory)
        most = self.pages_of(field.keep) * self.page
        return most if field.keep is None else min(most, self.rows * field.keep)


@dataclass(frozen=True)
class Bytes:
    """stored: what the declared fields need when everything is full. headroom: the rest of what is allocated, which is
    a window's room for the chunk in flight and for whole pages, and the saved states of sequence fields."""

    stored: int
    headroom: int

    @property
    def reserved(self) -> int:
        return self.stored + self.headroom


def every(fields: Fields) -> Iterator[StateField]:
    return (f for declared in fields.values() for f in declared)


def entry_bytes(field: StateField, dtype: str) -> int:
    """Bytes of one entry of a field."""
    return StateField(field.name, "sequence", field.shape, field.dtype).bytes(1, dtype)


def predict(fields: Fields, size: Size | PageSize, dtype: str) -> Bytes:
    """The bytes of a cache before it exists; `dtype` is the model's (`bfloat16`, `float32`, ...)."""
    stored = reserved = 0
    for field in every(fields):
        one = entry_bytes(field, dtype)
        stored += size.stored(field) * one
        reserved += math.prod(size.shape(field)) * one
    return Bytes(stored, reserved - stored)


def most_pages(size: PageSize, least: int, budget: int, reserved: Callable[[PageSize], int]) -> PageSize | None:
    """The size with as many pages, `least` or more, as `budget` bytes hold beside everything else that it reserves, and
    no more than change that; None where `least` do not fit."""
    counts = range(least, least + budget + 1)

    def cost(pages: int) -> int:
        return reserved(replace(size, pages=pages))

    fitting = bisect_right(counts, budget, key=cost)
    if not fitting:
        return None
    return replace(size, pages=counts[bisect_left(counts, cost(counts[fitting - 1]), key=cost)])


def within(fields: Fields, size: PageSize, dtype: str, budget: int, snapshot_budget: int = 0) -> PageSize:
    """The size with as many pages as `budget` bytes hold beside everything else it reserves, and as many snapshots as
    `snapshot_budget` bytes of them. ValueError where not one page fits."""
    one = sum(entry_bytes(f, dtype) for f in every(fields) if f.per == "sequence")
    size = replace(size, pages=1, snapshots=snapshot_budget // one if one else 0)
    found = most_pages(size, 1, budget, lambda size: predict(fields, size, dtype).reserved)
    if found is None:
        least = predict(fields, size, dtype).reserved
        raise ValueError(f"budget: {budget} bytes; one page and what stands beside it take {least}")
    return found
