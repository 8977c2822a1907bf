"""Dyck words: which bracket has to be closed next?

Hewitt et al. 2020, arXiv 2010.07515 (k kinds, depth up to m); Delétang et al. 2022, arXiv 2207.02098, stack tasks. It
is asked behind closing brackets only: behind an opening one the answer is that bracket. Bounded depth takes
m log2(k) bits; an LSTM and attention (Yao et al. 2021, arXiv 2105.11115) are expected to win, attention less so at
lengths that it was not trained on. What can only count each kind by itself fails from depth 3 on.
"""

from __future__ import annotations

from math import comb
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
        """The last bracket, and the one that was opened last, are closed and tell nothing about those around them. Who
        counts knows which brackets are open, and not in which order: all there is to know up to depth 2."""
        return {
            "always the same kind": always(self.kinds, self.floor),
            "the kind that was closed": Shortcut(lambda x: x, self.floor),
            "the kind that most are open of": Shortcut(self._counted, self._by_count),
        }

    def _counted(self, inputs: Ids) -> Ids:
        kinds = np.arange(self.kinds)
        opened = (inputs[:, :, None] == kinds).astype(np.int64) - (inputs[:, :, None] == self.kinds + kinds)
        return self.kinds + np.cumsum(opened, 1).argmax(2)

    @property
    def _by_count(self) -> float:
        """Open brackets are even draws: any of them is as likely to be the inner one."""
        asked = self._depths
        return sum(n * p for n, p in zip(asked, _most(self.kinds, len(asked) - 1), strict=True)) / sum(asked)

    @property
    def _depths(self) -> list[float]:
        """How many places of a row are asked with 0, 1, ... brackets open, in the mean."""
        now, asked = [1.0] + [0.0] * self.depth, [0.0] * self.depth
        for left in range(self.length, 0, -1):
            later = [0.0] * (self.depth + 1)
            for depth, share in enumerate(now):
                opens = float(depth == 0) or 0.5 * (depth < min(self.depth, left))
                if opens:
                    later[depth + 1] += share * opens
                if depth:
                    later[depth - 1] += share * (1 - opens)
                if depth > 1:
                    asked[depth - 1] += share * (1 - opens)
            now = later
        return asked


def _most(kinds: int, draws: int) -> list[float]:
    """Of 0, 1, ... `draws` even draws of kinds, the share in the mean that the most frequent kind has (of none: 0)."""
    beyond = [0] * (draws + 1)
    for most in range(draws):
        ways = [1] + [0] * draws  # to draw so many without any kind coming more often than `most`
        for _ in range(kinds):
            ways = [sum(comb(n, i) * ways[n - i] for i in range(min(most, n) + 1)) for n in range(draws + 1)]
        beyond = [count + kinds**n - less for n, (count, less) in enumerate(zip(beyond, ways, strict=True))]
    return [count / (max(n, 1) * kinds**n) for n, count in enumerate(beyond)]
