"""Stores of fields that look alike, as slices of one tensor: one operation reaches a place of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.cache.size import Kind


@dataclass(frozen=True)
class Shelf:
    """What stores that are parts of one tensor have in common. per: as their fields have it. pages: they have an entry
    for every page of the kind."""

    kind: Kind | None
    per: str
    pages: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


def allocated(
    shelves: Mapping[str, Mapping[str, Shelf]], device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[Shelf, Tensor]]:
    """The store of each field, by part and name, and each shelf's whole, [fields, ...].

    Zeros rather than empty: entries that nobody sees are multiplied by 0, and must be finite.
    """
    places: dict[Shelf, int] = {}
    for shelf in (shelf for own in shelves.values() for shelf in own.values()):
        places[shelf] = places.get(shelf, 0) + 1
    made = {s: torch.zeros((count, *s.shape), dtype=s.dtype, device=device) for s, count in places.items()}
    left = {shelf: iter(stores.unbind()) for shelf, stores in made.items()}
    return {part: {name: next(left[shelf]) for name, shelf in own.items()} for part, own in shelves.items()}, made
