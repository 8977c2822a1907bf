"""Strings that are said again after a mark."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from assay.data.tasks._tools import at_least, laid_out, next_symbol
from assay.data.tasks.base import Dice, Examples, Ids, Task


class Strings(Task):
    """Strings of `least` symbols to as many as fit twice, with a mark between string and answer; the rest is filled."""

    twice: ClassVar[str]  # how an error says that a string stands there two times

    least: int = Field(1, ge=1)
    symbols: int = Field(26, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 2 * self.least, f"strings of {self.least} (least) symbols{self.twice}")
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

    def said(self, rows: int, seed: int, first: int, backwards: bool) -> tuple[Examples, Ids]:
        """Rows of string, mark and string, and the size [rows] of each string."""
        dice = Dice(rows, first, self.kind_name(), seed)
        size = self.least + dice.below("size", 1, self.most - self.least + 1)
        string, there = dice.below("symbols", self.most, self.symbols), np.arange(self.most) < size
        mark, always_there = np.full((rows, 1), self.symbols), np.ones((rows, 1), np.bool_)

        def answer(part: NDArray[Any]) -> NDArray[Any]:
            return part[:, ::-1] if backwards else part

        pieces = np.hstack([string, mark, answer(string)])
        present = np.hstack([there, always_there, answer(there)])
        place = np.arange(self.length + 1)
        asked = (place > size) & (place <= 2 * size)
        return next_symbol(laid_out(pieces, present, self.length + 1, self.symbols + 1), asked), size[:, 0]

    def longer(self, factor: int) -> Self:
        """Strings that are longer than all of this task's."""
        least = self.least if factor == 1 else self.most + 1
        return self.resized(length=self.length * factor, least=least)
