"""Dyck words: which bracket has to be closed next?

Hewitt et al. 2020, arXiv 2010.07515 (k kinds, depth up to m); Delétang et al. 2022, arXiv 2207.02098, stack tasks. It
is asked behind closing brackets only: behind an opening one the answer is that bracket. Bounded depth takes
m log2(k) bits; an LSTM and attention (Yao et al. 2021, arXiv 2105.11115) are expected to win, attention less so at
lengths that it was not trained on. What can only count each kind by itself fails from depth 3 on.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class Dyck(Task):
    """Words of `kinds` kinds of brackets, 0 .. kinds-1 open and kinds .. 2 kinds-1 close, at most `depth` deep, closed
    at the end. Whether a bracket opens is a coin's decision wherever both can be."""

    kind: Literal["dyck"] = "dyck"
    length: int = Field(64, ge=4)
    kinds: int = Field(2, ge=2)
    depth: int = Field(8, ge=2)

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.length % 2:
            raise ValueError(f"length: {self.length}; accepted: even numbers, for every bracket is closed")
        return self

    @property
    def vocab(self) -> int:
        return 2 * self.kinds

    @property
    def floor(self) -> float:
        """The kind of an opening bracket is drawn evenly, and a closing one before tells nothing about it."""
        return 1 / self.kinds

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        coins, drawn = dice.below("open", self.length, 2), dice.below("kinds", self.length, self.kinds)
        inputs, targets = np.empty((rows, self.length), np.int64), np.full((rows, self.length), IGNORED)
        stack, depth = np.zeros((rows, self.depth + 1), np.int64), np.zeros(rows, np.int64)
        row = np.arange(rows)
        for place in range(self.length):
            left = self.length - place
            opens = (depth < min(self.depth, left)) & ((depth == 0) | (coins[:, place] == 1))
            kind = np.where(opens, drawn[:, place], stack[row, depth])
            depth = depth + np.where(opens, 1, -1)
            stack[row[opens], depth[opens]] = kind[opens]
            inputs[:, place] = np.where(opens, kind, self.kinds + kind)
            targets[:, place] = np.where(opens | (depth == 0), IGNORED, self.kinds + stack[row, depth])
        return Examples(inputs, targets)

    def solve(self, inputs: Ids) -> Ids:
        return np.array([self._read(row) for row in inputs.tolist()])

    def _read(self, row: list[int]) -> list[int]:
        """One row, with a stack."""
        stack: list[int] = []
        answers = []
        for symbol in row:
            if symbol < self.kinds:
                stack = [*stack, symbol]
            else:
                stack = stack[:-1]
            answers.append(self.kinds + stack[-1] if stack else 0)
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """The last bracket, and the one that was opened last, are closed and tell nothing about those around them."""
        return {
            "always the same kind": always(self.kinds, self.floor),
            "the kind that was closed": Shortcut(lambda x: x, self.floor),
        }
