"""Compression: a whole row of random symbols has to pass one place.

Poli et al. 2024 (MAD), arXiv 2403.17844, appendix B.1, at its sizes: 16 symbols, 32 to a row with the mark. There, a
decoder of its own sees nothing but the features at the mark. Here the model itself answers, from blanks behind the
mark: what a recurrent model carries across is its state, while attention looks back at the symbols and only copies.
Random symbols do not compress: n of them take n x log2(symbols) bits of state.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always, told
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Compression(Task):
    """Symbols, a mark, and as many blanks, where they are asked in order; a last blank where `length` is even."""

    kind: Literal["compression"] = "compression"
    length: int = Field(64, ge=3)
    symbols: int = Field(14, ge=2)

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    @property
    def floor(self) -> float:
        """The symbols are drawn evenly, each by itself."""
        return 1 / self.symbols

    @property
    def told(self) -> int:
        """How many symbols there are to keep."""
        return (self.length - 1) // 2

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        symbols = Dice(rows, first, self.kind_name(), seed).below("symbols", self.told, self.symbols)
        inputs = np.full((rows, self.length), self.symbols, np.int64)
        inputs[:, : self.told] = symbols
        inputs[:, self.told] = self.symbols + 1
        targets = np.full_like(inputs, IGNORED)
        targets[:, self.told + 1 : 2 * self.told + 1] = symbols
        return Examples(inputs, targets)

    def solve(self, inputs: Ids) -> Ids:
        return np.roll(inputs, self.told + 1, 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        one = (1 + (self.told - 1) * self.floor) / self.told
        return {
            "always 0": always(0, self.floor),
            "last symbol of all": Shortcut(lambda x: told(x[:, [self.told - 1]], x), one),
        }
