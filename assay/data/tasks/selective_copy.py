"""Selective copying: a few symbols stand among blanks; say them in order.

Gu and Dao 2023 (Mamba), arXiv 2312.00752, section 4.1.1, at the sizes of Poli et al. 2024 (MAD), arXiv 2403.17844,
appendix B.1: 16 symbols, rows of 256. The distances change from row to row: a convolution or a state that does not look
at its input fails; selective states (Mamba) and attention are expected to win.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import Some, always, at_least, told
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class SelectiveCopy(Task):
    """`copies` of `symbols` at random places among blanks, a mark, and as many blanks, where they are asked."""

    kind: Literal["selective_copy"] = "selective_copy"
    length: int = Field(256, ge=3)
    copies: int = Field(16, ge=1)
    symbols: int = Field(14, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 2 * self.copies + 1, f"{self.copies} symbols, a mark and as many answers")
        return self

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    @property
    def floor(self) -> float:
        """The symbols are drawn evenly, each by itself."""
        return 1 / self.symbols

    @property
    def _room(self) -> int:
        return self.length - self.copies - 1

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        symbols = dice.below("symbols", self.copies, self.symbols)
        blank, mark = self.symbols, self.symbols + 1
        inputs = np.full((rows, self.length), blank, np.int64)
        inputs[:, self._room] = mark
        np.put_along_axis(inputs, np.sort(dice.choose("places", self.copies, self._room), 1), symbols, 1)
        targets = np.full_like(inputs, IGNORED)
        targets[:, -self.copies :] = symbols
        return Examples(inputs, targets)

    def _symbols(self, inputs: Ids) -> Some:
        """Those to copy, read off."""
        blanks = inputs[:, : self._room] == self.symbols
        order = np.argsort(blanks, axis=1, kind="stable")
        return np.take_along_axis(inputs, order[:, : self.copies], 1)

    def solve(self, inputs: Ids) -> Ids:
        answers = np.zeros_like(inputs)
        answers[:, -self.copies :] = self._symbols(inputs)
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        one = (1 + (self.copies - 1) * self.floor) / self.copies
        lag = self.copies + 1
        return {
            "always 0": always(0, self.floor),
            "last symbol of all": Shortcut(lambda x: told(self._symbols(x)[:, -1:], x), one),
            # A blank is never an answer, and only this share of the places has something else.
            f"{lag} places back": Shortcut(lambda x: np.roll(x, lag, 1), self.copies / self._room),
        }
