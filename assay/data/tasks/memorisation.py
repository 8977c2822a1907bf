"""Memorisation: a map that never changes, and that the context does not tell.

Poli et al. 2024 (MAD), arXiv 2403.17844, appendix B.1, at its sizes: 256 symbols, rows of 32. Nothing has to be
mixed across places: what counts is how much the weights hold, so wide ffns and embeddings are expected to win.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from assay.data.draws import permutation
from assay.data.packing import IGNORED
from assay.data.tasks._tools import always
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Memorisation(Task):
    """A key and a mark in turn; at the mark the key's value is due. Half of the symbols, without the mark, are keys, as
    many are values, and `map_seed` says which belongs to which."""

    kind: Literal["memorisation"] = "memorisation"
    length: int = Field(32, ge=2)
    symbols: int = Field(256, ge=5)
    map_seed: int = Field(12345, ge=0)

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def pairs(self) -> int:
        """How many keys there are, and values."""
        return (self.symbols - 1) // 2

    @property
    def floor(self) -> float:
        """The map is one to one and keys are drawn evenly: who does not know it sees all values equally often."""
        return 1 / self.pairs

    @property
    def values(self) -> Int64[Ids, "K"]:
        """The value of every key."""
        return self.pairs + permutation(self.pairs, self.kind_name(), self.map_seed)

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        keys = Dice(rows, first, self.kind_name(), seed).below("keys", (self.length + 1) // 2, self.pairs)
        inputs = np.full((rows, self.length), self.symbols - 1, np.int64)
        inputs[:, ::2] = keys
        targets = np.full_like(inputs, IGNORED)
        targets[:, 1::2] = self.values[keys[:, : self.length // 2]]
        return Examples(inputs, targets)

    def solve(self, inputs: Ids) -> Ids:
        """Who knows the map reads the key before the mark."""
        keys = np.roll(inputs, 1, 1)
        return self.values[np.where(keys < self.pairs, keys, 0)]

    def shortcuts(self) -> dict[str, Shortcut]:
        """Among them a map that is one to one as well, but not the right one."""
        own = float(np.mean(self.values == self.pairs + np.arange(self.pairs)))
        return {
            "always the same value": always(self.pairs, self.floor),
            "the value of the key's number": Shortcut(lambda x: self.pairs + np.roll(x, 1, 1), own),
        }
