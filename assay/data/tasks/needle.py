"""Needles: marked pairs of a key and a value in rows of noise; some keys are asked at the end.

The symbolic core of RULER's retrieval tasks (Hsieh et al. 2024, arXiv 2404.06654, section 3.1): a single needle
(`keys: 1`), needles that distract (`keys: 8`), several questions (`keys: 8, queries: 4`). Attention is expected to win
at every length; a gated state can keep a needle and ignore the noise; one that decays loses those that stand early.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always, at_least, behind, laid_out
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task, place_in


class Needle(Task):
    """`keys` needles (a mark, a key, a value) at random places of a row of noise, then `queries` questions (another
    mark, one of the keys): the value is due at the key.

    All keys of a row are different, as are all values; both are of `symbols` symbols, the noise of `noise` others.
    """

    kind: Literal["needle"] = "needle"
    length: int = Field(128, ge=5)
    keys: int = Field(1, ge=1)
    queries: int = Field(1, ge=1)
    symbols: int = Field(64, ge=2)
    noise: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("symbols", self.symbols, self.keys, f"{self.keys} keys, and values, that differ")
        if self.queries > self.keys:
            raise ValueError(f"queries: {self.queries}; accepted: at most one for each of the {self.keys} keys")
        least = 3 * self.keys + 2 * self.queries
        at_least("length", self.length, least, f"{self.keys} needles and {self.queries} questions")
        return self

    @property
    def vocab(self) -> int:
        """Keys, values, noise, the mark of a needle and that of a question."""
        return 2 * self.symbols + self.noise + 2

    @property
    def floor(self) -> float:
        """A needle's value is drawn evenly."""
        return 1 / self.symbols

    @property
    def _room(self) -> int:
        """Where the questions begin."""
        return self.length - 2 * self.queries

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice, units = Dice(rows, first, self.kind_name(), seed), self._room - 2 * self.keys
        keys = dice.choose("keys", self.keys, self.symbols)
        values = self.symbols + dice.choose("values", self.keys, self.symbols)
        # A unit is a symbol of noise or a needle: three symbols.
        pieces = np.full((rows, units, 3), -1, np.int64)
        pieces[:, :, 0] = 2 * self.symbols + dice.below("noise", units, self.noise)
        needles = np.stack([np.full_like(keys, self.vocab - 2), keys, values], 2)
        np.put_along_axis(pieces, dice.choose("places", self.keys, units)[:, :, None], needles, 1)
        hay = laid_out(pieces, pieces >= 0, self._room, 0)
        which = dice.choose("which", self.queries, self.keys)
        asked = np.take_along_axis(keys, which, 1)
        questions = np.stack([np.full_like(asked, self.vocab - 1), asked], 2).reshape(rows, -1)
        targets = np.full((rows, self.length), IGNORED)
        targets[:, self._room + 1 :: 2] = np.take_along_axis(values, which, 1)
        return Examples(np.hstack([hay, questions]), targets)

    def solve(self, inputs: Ids) -> Ids:
        """The symbol behind the key in the hay."""
        hay = inputs[:, : self._room]
        return np.take_along_axis(hay, np.minimum(place_in(hay, inputs) + 1, self._room - 1), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """A value of the row is right for one of its keys: all there is to do with a single needle."""
        found = {"always the same value": always(self.symbols, self.floor), "last symbol": Shortcut(lambda x: x, 0.0)}
        if self.keys > 1:
            found["first value"] = Shortcut(lambda x: behind(x, self.vocab - 2, 2), 1 / self.keys)
        return found
