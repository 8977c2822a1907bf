"""Phone book: names with numbers, and at the end one of the names.

Jelassi et al. 2024, arXiv 2402.01032, section 4: look up one entry of many. Attention is expected to win at any size of
the book; a state of fixed size must hold all of it, for the question comes last.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import Column, always, at_least, countable, different, followed, next_symbol, tried
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task

DIGITS = 10


class Phonebook(Task):
    """As many entries as fit: `name` letters of `letters`, `digits` digits, a mark; then another mark, a name, and its
    number, which is asked digit by digit. No two names are the same. What is left of a row is filled."""

    kind: Literal["phonebook"] = "phonebook"
    length: int = Field(256, ge=2)
    letters: int = Field(26, ge=2)
    name: int = Field(3, ge=1)
    digits: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 3 * (self.name + self.digits) + 2, "two entries and a question")
        names = countable("letters", self.letters, self.name)
        if self.entries > names:
            raise ValueError(f"name: {self.name} of {self.letters} letters; {self.entries} entries, {names} names")
        return self

    @property
    def entries(self) -> int:
        return (self.length - self.name - self.digits) // (self.name + self.digits + 1)

    @property
    def vocab(self) -> int:
        """Digits, letters, the mark of an entry and that of the question."""
        return DIGITS + self.letters + 2

    @property
    def floor(self) -> float:
        """The digits are drawn evenly, each by itself."""
        return 1 / DIGITS

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        codes = different(dice, "names", self.entries, self.letters**self.name)
        letters = codes[:, :, None] // self.letters ** np.arange(self.name) % self.letters
        digits = dice.below("digits", self.entries * self.digits, DIGITS).reshape(rows, self.entries, self.digits)
        marks = np.full((rows, self.entries, 1), self.vocab - 2)
        book = np.concatenate([DIGITS + letters, digits, marks], 2)
        which = dice.below("which", 1, self.entries)
        entry = np.take_along_axis(book, which[:, :, None], 1)[:, 0, :-1]
        tokens = np.full((rows, self.length + 1), self.vocab - 2)
        end = self._end
        tokens[:, :end] = book.reshape(rows, end)
        tokens[:, end] = self.vocab - 1
        tokens[:, end + 1 : end + 1 + entry.shape[1]] = entry
        asked = np.zeros_like(tokens, np.bool_)
        asked[:, end + 1 + self.name : end + 1 + entry.shape[1]] = True
        return next_symbol(tokens, asked)

    @property
    def _end(self) -> int:
        """Where the question begins."""
        return self.entries * (self.name + self.digits + 1)

    def _numbers(self, inputs: Ids, which: Column) -> Ids:
        """The numbers of entries `which` at the places where they are asked."""
        book = inputs[:, : self._end].reshape(len(inputs), self.entries, -1)
        answers = np.zeros_like(inputs)
        start = self._end + self.name
        answers[:, start : start + self.digits] = np.take_along_axis(book, which[:, :, None], 1)[:, 0, self.name : -1]
        return answers

    def solve(self, inputs: Ids) -> Ids:
        names = inputs[:, : self._end].reshape(len(inputs), self.entries, -1)[:, :, : self.name]
        wanted = inputs[:, self._end + 1 : self._end + 1 + self.name]
        return self._numbers(inputs, (names == wanted[:, None]).all(2).argmax(1)[:, None])

    def shortcuts(self) -> dict[str, Shortcut]:
        one = 1 / self.entries + (1 - 1 / self.entries) * self.floor
        return {
            "always 0": always(0, self.floor),
            "first number": Shortcut(lambda x: self._numbers(x, x[:, :1] * 0), one),
            "last number": Shortcut(lambda x: self._numbers(x, x[:, :1] * 0 + self.entries - 1), one),
            "last symbol": Shortcut(lambda x: x, self._last),
            "what followed this symbol last": tried(self, lambda x: followed(x, self.vocab)),
        }

    @property
    def _last(self) -> float:
        """The digit before; behind the name stands a letter."""
        return (self.digits - 1) / self.digits * self.floor
