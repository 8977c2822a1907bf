"""How many bytes a cache takes, from the declared state alone. Allocates nothing and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from assay.spec.base import StateField

Fields = Mapping[str, tuple[StateField, ...]]


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
        for name, least in (("rows", 1), ("tokens", 1), ("chunk", 1), ("memory", 0), ("saves", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"cache size: {name} is {getattr(self, name)}; accepted: {least} or more")

    def capacity(self, field: StateField) -> int:
        """Entries of a row that are allocated for a token or memory field."""
        if field.every != 1:
            raise ValueError(f"state field {field.name}: every={field.every}; this cache keeps one entry a token")
        if field.per == "memory":
            return self.memory
        return self.tokens if field.keep is None else min(self.tokens, field.keep + self.chunk - 1)


@dataclass(frozen=True)
class Bytes:
    """stored: what the declared fields need when every row is full. headroom: the rest of what is allocated, which is
    a window's room for the chunk in flight and the saved states of sequence fields."""

    stored: int
    headroom: int

    @property
    def reserved(self) -> int:
        return self.stored + self.headroom


def predict(fields: Fields, size: Size, dtype: str) -> Bytes:
    """The bytes of a cache before it exists; `dtype` is the model's (`bfloat16`, `float32`, ...)."""
    stored = headroom = 0
    for field in (f for declared in fields.values() for f in declared):
        full = field.bytes(size.tokens, dtype, size.memory)
        stored += size.rows * full
        if field.per == "sequence":
            headroom += size.rows * full * (size.saves - 1)
        else:
            entries = field.entries(size.tokens, size.memory)
            headroom += size.rows * (size.capacity(field) - entries) * (full // entries if entries else 0)
    return Bytes(stored, headroom)
