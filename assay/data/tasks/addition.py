"""Addition with the lowest digit first: two numbers of n digits, and the n + 1 digits of their sum.

Lee et al. 2023, arXiv 2307.03381 (reversed digits, learned up to the trained length); Zhou et al. 2024, arXiv
2402.09371, and Delétang et al. 2022, arXiv 2207.02098, for what happens beyond it. Learned up to 10 digits and asked at
up to 20 by default. Every digit needs two digits at a distance that is the number's length, and a carry: attention is
expected to win within the trained lengths, and to lose the places beyond them.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.tasks._tools import always, at_least, laid_out, next_symbol
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task

BASE, PLUS, EQUALS, BLANK = 10, 10, 11, 12


class Addition(Task):
    """`a + b = c`, as one symbol a digit and two marks, for numbers of `least` digits up to as many as fit into a row
    (leading zeros are digits). What is left of it is blank."""

    kind: Literal["addition"] = "addition"
    length: int = Field(32, ge=2)
    least: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        at_least("length", self.length, 3 * self.least + 2, f"numbers of {self.least} (least) digits")
        return self

    @property
    def most(self) -> int:
        """The digits of the longest numbers: 3 n + 2 symbols, for the sum's last digit is only an answer."""
        return (self.length - 2) // 3

    @property
    def vocab(self) -> int:
        return BLANK + 1

    @property
    def floor(self) -> float:
        """All digits of a sum but the last are even draws, modulo ten; the last, a carry, is 0 in slightly more than
        half of the sums. Best is always 0."""
        sizes = range(self.least, self.most + 1)
        return sum(n / BASE + (1 + BASE**-n) / 2 for n in sizes) / sum(n + 1 for n in sizes)

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, self.kind_name(), seed)
        size = self.least + dice.below("size", 1, self.most - self.least + 1)
        a, b = (dice.below(name, self.most, BASE) for name in "ab")
        there, carry = np.arange(self.most + 1) < size, np.zeros(rows, np.int64)
        both = np.pad(a + b, ((0, 0), (0, 1))) * there
        c = np.empty_like(both)
        for digit, column in enumerate(both.T):
            c[:, digit] = (column + carry) % BASE
            carry = (column + carry) // BASE
        marks, always_there = np.full((rows, 1), PLUS), np.ones((rows, 1), np.bool_)
        pieces = np.hstack([a, marks, b, marks - PLUS + EQUALS, c])
        number, answer = there[:, :-1], np.arange(self.most + 1) <= size
        present = np.hstack([number, always_there, number, always_there, answer])
        place = np.arange(self.length + 1)
        asked = (place >= 2 * size + 2) & (place < 3 * size + 3)
        return next_symbol(laid_out(pieces, present, self.length + 1, BLANK), asked)

    def solve(self, inputs: Ids) -> Ids:
        return np.array([_sum(row) for row in inputs.tolist()])

    def shortcuts(self) -> dict[str, Shortcut]:
        return {"always 0": always(0, self.floor), "without carrying": Shortcut(_dry, self._dry)}

    @property
    def _dry(self) -> float:
        """A digit has a carry to add in slightly less than half of the sums of the digits below."""
        sizes = range(self.least, self.most + 1)
        right = sum((1 + BASE**-below) / 2 for n in sizes for below in range(n + 1))
        return right / sum(n + 1 for n in sizes)

    def longer(self, factor: int) -> Self:
        """Numbers that are longer than all of this task's."""
        least = self.least if factor == 1 else self.most + 1
        return self.resized(length=self.length * factor, least=least)


def _numbers(row: list[int]) -> tuple[int, list[int], list[int]]:
    """Where the sum begins, and the digits of both numbers."""
    plus, equals = row.index(PLUS), row.index(EQUALS)
    return equals, row[:plus], row[plus + 1 : equals]


def _sum(row: list[int]) -> list[int]:
    """One row, with the integers of the language."""
    place, a, b = _numbers(row)
    total = sum(int("".join(map(str, reversed(digits)))) for digits in (a, b))
    answer = [int(digit) for digit in reversed(f"{total:0{len(a) + 1}d}")]
    return ([0] * place + answer + [0] * len(row))[: len(row)]


def _dry(inputs: Ids) -> Ids:
    """Each digit modulo ten; nothing stands where the last carry goes."""
    answers = np.zeros_like(inputs)
    for row, answer in zip(inputs.tolist(), answers):
        place, a, b = _numbers(row)
        answer[place : place + len(a)] = [(i + j) % BASE for i, j in zip(a, b)]
    return answers
