"""Stacked associative recall: a key and its value in one symbol, then keys, each to be answered with its value.

The stacked form of MQAR (Arora et al. 2023, arXiv 2312.04927; the authors' code stacks the embeddings of the two). In
`mqar` a layer has to bring a key to the value behind it before anything can be looked up: a short convolution does, or
a layer before. Here they stand at one place, so that one layer of attention, or one linear state, suffices: who fails
here fails at looking up. An input is one symbol, so a pair is a symbol of its own, whose row of the embedding has to
learn which key and which value it is.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task, place_in


class StackedMqar(Task):
    """`passes` times the same `pairs` pairs, each time in another order, then keys, evenly drawn, up to `length`.

    Keys, `keys` of them, are the first symbols, then `values` values, then every pair of the two. A row has `pairs`
    different keys with as many different values. Two passes show who reads a list better that was seen before (Arora
    et al. 2024, arXiv 2407.05483).
    """

    kind: Literal["stacked_mqar"] = "stacked_mqar"
    length: int = Field(32, ge=4)
    pairs: int = Field(8, ge=2)
    keys: int = Field(32, ge=2)
    values: int = Field(32, ge=2)
    passes: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length < self.told + self.pairs:
            least = self.told + self.pairs
            raise ValueError(f"length: {self.length}; {self.pairs} pairs, each asked, need {least} or more")
        for name, count in (("keys", self.keys), ("values", self.values)):
            if count < self.pairs:
                raise ValueError(f"{name}: {count}; {self.pairs} pairs need {self.pairs} or more")
        return self

    @property
    def told(self) -> int:
        """Symbols before the first question."""
        return self.pairs * self.passes

    @property
    def vocab(self) -> int:
        return self.keys + self.values + self.keys * self.values

    @property
    def floor(self) -> float:
        """Every value is equally likely to have been given to a key."""
        return 1 / self.values

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind, seed)
        keys, values = dice.choose("keys", self.pairs, self.keys), dice.choose("values", self.pairs, self.values)
        stacked = self.keys + self.values + keys * self.values + values
        orders = [dice.choose(f"order {i}", self.pairs, self.pairs) for i in range(self.passes)]
        which = dice.below("which", self.length - self.told, self.pairs)
        inputs = [*(np.take_along_axis(stacked, o, 1) for o in orders), np.take_along_axis(keys, which, 1)]
        answers = self.keys + np.take_along_axis(values, which, 1)
        unasked = np.full((rows, self.told), IGNORED)
        return Examples(np.concatenate(inputs, 1), np.concatenate([unasked, answers], 1))

    def _pairs_of(self, inputs: Ids) -> tuple[Ids, Ids]:
        """The keys and the values [R, n] of rows."""
        keys, values = np.divmod(inputs[:, : self.pairs] - self.keys - self.values, self.values)
        return keys, self.keys + values

    def solve(self, inputs: Ids) -> Ids:
        keys, values = self._pairs_of(inputs)
        return np.take_along_axis(values, place_in(keys, inputs), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """Each answers with a value of the row, which excludes most of the others."""
        return {
            "last value": Shortcut(lambda x: self._value(x, -1), 1 / self.pairs),
            "first value": Shortcut(lambda x: self._value(x, 0), 1 / self.pairs),
            "the value beside the next key": Shortcut(self._beside, 1 / self.pairs),
        }

    def _value(self, inputs: Ids, pair: int) -> Ids:
        return np.broadcast_to(self._pairs_of(inputs)[1][:, [pair]], inputs.shape)

    def _beside(self, inputs: Ids) -> Ids:
        """The value of the pair behind the right one: what a head off by one would read, right where there is none."""
        keys, values = self._pairs_of(inputs)
        found = place_in(keys, inputs)
        return np.take_along_axis(values, np.minimum(found + 1, self.pairs - 1), 1)

    def longer(self, factor: int) -> Self:
        """As many times the pairs."""
        return self.resized(length=self.length * factor, pairs=self.pairs * factor)
