"""Reversal: a string, a mark, and the string backwards.

Deletang et al. 2022, arXiv 2207.02098, table 1 ("Reverse String"): a stack does it at any length. The string and the
mark are a prefix: an encoder reads them.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, at_least, followed, laid_out, next_symbol
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Reversal(Task):
    """Strings of `least` symbols to as many as fit twice, with a mark between string and answer; the rest is filled."""

    kind: Literal["reversal"] = "reversal"
    length: int = Field(32, ge=2)
    least: int = Field(1, ge=1)
    symbols: int = Field(26, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 2 * self.least, f"strings of {self.least} (least) symbols, there and back,")
        return self

    @property
    def most(self) -> int:
        """The longest strings: the last symbol is only an answer."""
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
        pieces, present = np.hstack([string, mark, string[:, ::-1]]), np.hstack([there, always_there, there[:, ::-1]])
        place = np.arange(self.length + 1)
        asked = (place > size) & (place <= 2 * size)
        found = next_symbol(laid_out(pieces, present, self.length + 1, self.symbols + 1), asked)
        return Examples(found.inputs, found.targets, size[:, 0] + 1)

    def solve(self, inputs: Ids) -> Ids:
        """The answer t places behind the mark stands t + 1 places before it."""
        size = np.argmax(inputs == self.symbols, axis=1)[:, None]
        return np.take_along_axis(inputs, np.clip(2 * size - 1 - np.arange(self.length), 0, self.length - 1), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """What followed a symbol in the string precedes it in the answer: by chance it is the symbol behind, too."""
        follows = Shortcut(lambda x: followed(x, self.vocab), self.floor)
        return {"always 0": always(0, self.floor), "what followed this symbol last": follows}

    def longer(self, factor: int) -> Self:
        """Strings that are longer than all of this task's."""
        least = self.least if factor == 1 else self.most + 1
        return self.resized(length=self.length * factor, least=least)
