"""Frequent words: words as often as in a text, by Zipf's law; which are the most frequent?

The symbolic core of RULER's frequent words extraction (Hsieh et al. 2024, arXiv 2404.06654, section 3.3): the word of
rank r stands length x r^-alpha / zeta(alpha) times, rounded down; that of rank 1 is noise, and the next three are
asked, the most frequent first. Attention that averages evenly, or a state that adds up, is expected to win; how far
apart the counts are decides how well it must count.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, at_least, told
from assay.data.tasks._words import answered, first_word
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class FrequentWords(Task):
    """Words in random order with noise, a mark, behind which the `top` words are asked. A word is one of `symbols`.

    alpha: the exponent. Sizes at which the counts of the words that are asked, and of the next one, are not different
    are refused.
    """

    kind: Literal["frequent_words"] = "frequent_words"
    length: int = Field(128, ge=4)
    top: int = Field(3, ge=1)
    alpha: float = Field(2.0, gt=1.0, le=16.0)
    symbols: int = Field(64, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, self.top + 2, f"{self.top} answers, a word and noise")
        often = [*self.often, 0][: self.top + 1]
        if len(often) <= self.top or len(set(often)) <= self.top:
            raise ValueError(f"top: {self.top}; in rows of {self.length} (length) words stand {self.often} times")
        at_least("symbols", self.symbols, len(self.often), f"{len(self.often)} words")
        return self

    @property
    def often(self) -> tuple[int, ...]:
        """How often the words stand, the most frequent first."""
        from scipy.special import zeta

        ranks = np.arange(2, self._room + 1, dtype=np.float64)
        found = (self._room * ranks**-self.alpha / float(zeta(self.alpha))).astype(np.int64)
        return tuple(found[found > 0].tolist())

    @property
    def _room(self) -> int:
        """Where the mark stands."""
        return self.length - self.top

    @property
    def vocab(self) -> int:
        """Words, noise and the mark."""
        return self.symbols + 2

    @property
    def floor(self) -> float:
        """The words are a random choice in random order: each is equally likely to be the next answer."""
        return 1 / self.symbols

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice, often = Dice(rows, first, self.kind_name(), seed), self.often
        words = dice.choose("words", len(often), self.symbols)
        listed = np.full((rows, self._room), self.symbols)
        listed[:, : sum(often)] = np.repeat(words, often, axis=1)
        listed = np.take_along_axis(listed, dice.choose("shuffle", self._room, self._room), 1)
        return answered(listed, words[:, : self.top], self.vocab - 1)

    def solve(self, inputs: Ids) -> Ids:
        """Every word as often as it stands, the most frequent first."""
        answers = np.zeros_like(inputs)
        for row, found in zip(inputs.tolist(), answers):
            often = Counter(symbol for symbol in row[: self._room] if symbol < self.symbols)
            found[self._room :] = [word for word, _ in often.most_common(self.top)]
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """The first word is one of the asked ones as often as they stand in the list, and then one answer is right."""
        once = sum(self.often[: self.top]) / sum(self.often) / self.top
        return {
            "always 0": always(0, self.floor),
            "first word": Shortcut(lambda x: told(first_word(x, self.symbols), x), once),
        }
