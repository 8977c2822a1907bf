"""Induction heads: what stood behind this symbol the last time?

A block of different symbols is repeated (Olsson et al. 2022, arXiv 2209.11895; Zoology, arXiv 2312.04927, section 3).
Its length is drawn for every row, so that a copy at a fixed distance, which one layer of attention with rotated
positions makes, is not enough. Two layers of attention, or one behind a short convolution, are expected to win; a state
of fixed size must hold the block.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always, at_least, followed, told
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Induction(Task):
    """Blocks of `least` to `most` different symbols, repeated up to `length`; asked from the first repetition on."""

    kind: Literal["induction"] = "induction"
    length: int = Field(64, ge=2)
    least: int = Field(16, ge=2)
    most: int = Field(32, ge=2)
    symbols: int = Field(32, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("most", self.most, self.least, f"blocks of {self.least} (least) symbols")
        at_least("symbols", self.symbols, self.most, f"blocks of {self.most} (most) different symbols")
        at_least("length", self.length, self.most + 1, f"blocks of {self.most} (most) symbols and a repeated one")
        return self

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def floor(self) -> float:
        """A block is a random choice in random order: every symbol is equally likely at every place."""
        return 1 / self.symbols

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        size = self.least + dice.below("size", 1, self.most - self.least + 1)
        block = dice.choose("block", self.most, self.symbols)
        tokens = np.take_along_axis(block, np.arange(self.length + 1) % size, 1)
        asked = np.arange(self.length) >= size
        return Examples(tokens[:, :-1], np.where(asked, tokens[:, 1:], IGNORED))

    def solve(self, inputs: Ids) -> Ids:
        return followed(inputs, self.symbols)

    def shortcuts(self) -> dict[str, Shortcut]:
        lag = max(range(self.least, self.length + 1), key=self._at_distance)
        return {
            "always 0": always(0, self.floor),
            "first symbol": Shortcut(lambda x: told(x[:, :1], x), self._first),
            f"{lag} places back": Shortcut(
                lambda x: np.pad(x, ((0, 0), (lag - 1, 0)))[:, : x.shape[1]], self._at_distance(lag)
            ),
        }

    def _over_sizes(self, right: dict[int, int]) -> float:
        return sum(right.values()) / sum(self.length - size for size in right)

    def _at_distance(self, lag: int) -> float:
        """How often the answer stood `lag` places before its own: wherever whole blocks make up that distance. Where
        the row has not begun, 0 is answered, and right in at most one of `symbols`."""
        sizes = range(self.least, self.most + 1)
        found = self._over_sizes({p: (self.length + 1 - max(lag, p + 1)) * (lag % p == 0) for p in sizes})
        outside = self._over_sizes({p: max(0, lag - 1 - p) for p in sizes})
        return found + outside * self.floor

    @property
    def _first(self) -> float:
        """How often a block begins anew behind an asked place."""
        return self._over_sizes({p: self.length // p - 1 for p in range(self.least, self.most + 1)})
