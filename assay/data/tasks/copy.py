"""Copying: a string, a mark, and the string again.

Jelassi et al. 2024, arXiv 2402.01032, section 2: strings of drawn lengths, continued symbol by symbol. Attention is
expected to win and to go on at longer strings; a state of fixed size must hold the string, and fails from some length
on.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, at_least, followed, laid_out, next_symbol
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Copy(Task):
    """Strings of `least` symbols to as many as fit twice, with a mark between string and copy; the rest is filled."""

    kind: Literal["copy"] = "copy"
    length: int = Field(64, ge=2)
    least: int = Field(1, ge=1)
    symbols: int = Field(26, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 2 * self.least, f"strings of {self.least} (least) symbols and their copies")
        return self

    @property
    def most(self) -> int:
        """The longest strings: the last symbol of the copy is only an answer."""
        return self.length // 2

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    @property
    def floor(self) -> float:
        """The symbols are drawn evenly, each by itself."""
        return 1 / self.symbols

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        size = self.least + dice.below("size", 1, self.most - self.least + 1)
        string, there = dice.below("symbols", self.most, self.symbols), np.arange(self.most) < size
        mark, always_there = np.full((rows, 1), self.symbols), np.ones((rows, 1), np.bool_)
        pieces, present = np.hstack([string, mark, string]), np.hstack([there, always_there, there])
        place = np.arange(self.length + 1)
        asked = (place > size) & (place <= 2 * size)
        return next_symbol(laid_out(pieces, present, self.length + 1, self.symbols + 1), asked)

    def solve(self, inputs: Ids) -> Ids:
        """The copy stands one symbol and the string behind the string."""
        size = np.argmax(inputs == self.symbols, axis=1)[:, None]
        return np.take_along_axis(inputs, np.maximum(np.arange(self.length) - size, 0), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        return {
            "always 0": always(0, self.floor),
            "what followed this symbol last": Shortcut(lambda x: followed(x, self.vocab), self._by_symbol),
        }

    @property
    def _by_symbol(self) -> float:
        """Right where the symbol stands nowhere else in the string, and otherwise by chance; never at the mark, whose
        answer is 0 then."""
        sizes = range(self.least, self.most + 1)
        alone = sum((n - 1) * (1 - self.floor) ** (n - 1) for n in sizes)
        asked = sum(sizes)
        return (alone + (asked - alone) * self.floor) / asked

    def longer(self, factor: int) -> Self:
        """Strings that are longer than all of this task's."""
        least = self.least if factor == 1 else self.most + 1
        return self.resized(length=self.length * factor, least=least)
