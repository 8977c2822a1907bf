"""Fuzzy recall: keys and values are motifs of one to three symbols.

Poli et al. 2024 (MAD), arXiv 2403.17844, appendix B.1: 16 symbols, rows of 128, motifs of up to 3. A key has to be put
together before it can be looked up, which takes a short convolution, or a layer of attention, before the one that
recalls. Here a row uses a few keys many times, so that most of them are asked; in MAD one is asked, at the end.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, countable, different, followed, laid_out, next_symbol, tried
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task

LISTED = 1 << 16  # motifs of a size: among more of them a row's are drawn one by one


class FuzzyRecall(Task):
    """Pairs of one of a row's `keys` motifs and its value, a motif of other symbols, as far as they fit.

    Keys are made of `symbols` symbols and values of as many others; the sizes of keys, 1 to `motif`, take turns, those
    of values are drawn. Asked is the value, symbol by symbol, wherever its key was seen before.
    """

    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    length: int = Field(128, ge=8)
    keys: int = Field(8, ge=2)
    symbols: int = Field(7, ge=2)
    motif: int = Field(3, ge=1, le=8)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        countable("symbols", self.symbols, self.motif)
        for size in range(1, self.motif + 1):
            if len(self._slots(size)) > self.symbols**size:
                most = self.symbols**size
                raise ValueError(f"keys: {self.keys}; {len(self._slots(size))} of size {size}, and {most} exist")
        if self.length < 4 * self.motif:
            raise ValueError(f"length: {self.length}; two pairs of motifs of {self.motif} need {4 * self.motif}")
        return self

    def _slots(self, size: int) -> range:
        """The keys of this size, by their numbers."""
        return range(size - 1, self.keys, self.motif)

    @property
    def vocab(self) -> int:
        return 2 * self.symbols + 1

    @property
    def floor(self) -> float:
        """The symbols of values are drawn evenly, each by itself."""
        return 1 / self.symbols

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice, n = Dice(rows, first, self.kind_name(), seed), self.length // 2 + 1
        keys, values = self._motifs(dice)
        which = dice.below("which", n, self.keys)
        again = np.tril(which[:, :, None] == which[:, None, :], -1).any(2)
        motifs = np.concatenate([keys, values], 2)
        pieces = np.take_along_axis(motifs, which[:, :, None], 1)
        asked = np.zeros_like(pieces, np.bool_)
        asked[:, :, self.motif :] = again[:, :, None]
        present = pieces >= 0
        fits = np.cumsum(present.sum(2), 1) <= self.length + 1
        present &= fits[:, :, None]
        tokens = laid_out(pieces, present, self.length + 1, 2 * self.symbols)
        return next_symbol(tokens, laid_out(asked.astype(np.int64), present, self.length + 1, 0) == 1)

    def _motifs(self, dice: Dice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys and values [R, keys, motif], -1 behind their ends."""
        shape = (len(dice), self.keys, self.motif)
        keys = np.full(shape, -1, np.int64)
        for size in range(1, self.motif + 1):
            slots = self._slots(size)
            if slots:
                there = f"keys of {size}", len(slots), self.symbols**size
                number = dice.choose(*there) if self.symbols**size <= LISTED else different(dice, *there)
                for digit in range(size):
                    keys[:, slots, digit] = number // self.symbols**digit % self.symbols
        values = self.symbols + dice.below("values", self.keys * self.motif, self.symbols).reshape(shape)
        sizes = 1 + dice.below("sizes", self.keys, self.motif)
        return keys, np.where(np.arange(self.motif) < sizes[:, :, None], values, -1)

    def solve(self, inputs: Ids) -> Ids:
        return np.array([self._read(row) for row in inputs.tolist()])

    def _read(self, row: list[int]) -> list[int]:
        """One row, symbol by symbol: a key, then a value, then what they were is remembered."""
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        key: tuple[int, ...] = ()
        value: tuple[int, ...] = ()
        answers = []
        for symbol in row:
            if symbol < self.symbols:
                if value:
                    known[key] = value
                    key, value = (), ()
                key = (*key, symbol)
            else:
                value = (*value, symbol)
            rest = known.get(key, ())[len(value) :]
            answers.append(rest[0] if rest else 0)
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """Keys that end in different symbols need not be put together: one lookup tells them apart."""
        return {
            "always the same symbol": always(self.symbols, self.floor),
            "what followed this symbol last": tried(self, lambda x: followed(x, self.vocab)),
        }
