"""Common words: some stand more often than the others; which?

The symbolic core of RULER's common words extraction (Hsieh et al. 2024, arXiv 2404.06654, section 3.3): a shuffled list
of words, and the common ones are asked. RULER takes them in any order; a label at each place needs one, so here it is
the order in which they first stand. A model must count: attention that averages evenly, or a state that adds up.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, at_least, told
from assay.data.tasks._words import answered, first_word
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class CommonWords(Task):
    """`common` words, `times` times each, and `rare` words, `rare_times` times each, shuffled with blanks that fill the
    row; then a mark, behind which the common ones are asked. A word is one of `symbols` symbols."""

    kind: Literal["common_words"] = "common_words"
    length: int = Field(64, ge=4)
    common: int = Field(4, ge=1)
    times: int = Field(6, ge=2)
    rare: int = Field(16, ge=1)
    rare_times: int = Field(2, ge=1)
    symbols: int = Field(64, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("symbols", self.symbols, self.common + self.rare, f"{self.common} common and {self.rare} rare words")
        at_least("times", self.times, self.rare_times + 1, f"words that are rare at {self.rare_times} times")
        at_least("length", self.length, self._listed + self.common, f"{self._listed} listed words and their questions")
        return self

    @property
    def _listed(self) -> int:
        return self.common * self.times + self.rare * self.rare_times

    @property
    def _room(self) -> int:
        """Where the mark stands."""
        return self.length - self.common

    @property
    def vocab(self) -> int:
        """Words, a blank and the mark."""
        return self.symbols + 2

    @property
    def floor(self) -> float:
        """The words are a random choice in random order: each is equally likely to be the next answer."""
        return 1 / self.symbols

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        words = dice.choose("words", self.common + self.rare, self.symbols)
        often = np.repeat([self.times, self.rare_times], [self.common, self.rare])
        listed = np.full((rows, self._room), self.symbols)
        listed[:, : self._listed] = np.repeat(words, often, axis=1)
        listed = np.take_along_axis(listed, dice.choose("shuffle", self._room, self._room), 1)
        common = words[:, : self.common]
        order = np.argsort((listed[:, None, :] == common[:, :, None]).argmax(2), axis=1)
        return answered(listed, np.take_along_axis(common, order, 1), self.vocab - 1)

    def solve(self, inputs: Ids) -> Ids:
        """Every word as often as it stands; those that reach `times`, the first first."""
        answers = np.zeros_like(inputs)
        for row, found in zip(inputs.tolist(), answers):
            often = Counter(row[: self._room])
            found[self._room :] = [w for w, n in often.items() if w < self.symbols and n >= self.times]
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """The first word of all is often a common one, and then the first answer."""
        once = self.common * self.times / self._listed / self.common
        return {
            "always 0": always(0, self.floor),
            "first word": Shortcut(lambda x: told(first_word(x, self.symbols), x), once),
        }

    def longer(self, factor: int) -> Self:
        """The same number of words, each as many times as often."""
        return self.resized(length=self.length * factor, times=self.times * factor, rare_times=self.rare_times * factor)
