"""In-context recall as MAD draws it: pairs of a key and its value, each key as often as it comes."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always, earlier, followed
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Recall(Task):
    """Pairs of one of `keys` and the one of `values` that the row gives it (two keys may have the same). A key is asked
    wherever it was seen before."""

    length: int = Field(128, ge=4)
    keys: int = Field(8, ge=2)
    values: int = Field(8, ge=2)

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.length % 2:
            raise ValueError(f"length: {self.length}; accepted: even numbers, for a row is made of pairs")
        return self

    @property
    def share(self) -> float:
        """The share of pairs that are noise."""
        return 0.0

    @property
    def others(self) -> int:
        """Symbols of which noise is made."""
        return 0

    @property
    def vocab(self) -> int:
        return self.keys + self.values + self.others

    @property
    def floor(self) -> float:
        """A row gives every key a value evenly, so each is equally likely at every place."""
        return 1 / self.values

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice, n = Dice(rows, first, self.kind_name(), seed), self.length // 2
        keys = dice.below("keys", n, self.keys)
        values = np.take_along_axis(self.keys + dice.below("values", self.keys, self.values), keys, 1)
        pairs = np.stack([keys, values], 2)
        if self.share:
            noise = dice.share("noisy", n) < self.share
            between = self.keys + self.values + dice.below("noise", 2 * n, self.others).reshape(rows, n, 2)
            pairs = np.where(noise[:, :, None], between, pairs)
        inputs = pairs.reshape(rows, self.length)
        asked = (inputs < self.keys) & (earlier(inputs, self.vocab) >= 0)
        return Examples(inputs, np.where(asked, np.roll(inputs, -1, 1), IGNORED))

    def solve(self, inputs: Ids) -> Ids:
        return followed(inputs, self.vocab)

    def shortcuts(self) -> dict[str, Shortcut]:
        return {"always the same value": always(self.keys, self.floor), "last symbol": Shortcut(_before, self._last)}

    @property
    def _last(self) -> float:
        """The symbol before a key is the value of that key if the pair before had it, and of another one otherwise."""
        here = (1 - self.share) / self.keys
        asked = sum(1 - (1 - here) ** pairs for pairs in range(1, self.length // 2))
        same = here * (self.length // 2 - 1) / asked
        return same + (1 - same) * self.floor


def _before(inputs: Ids) -> Ids:
    return np.roll(inputs, 1, 1)
