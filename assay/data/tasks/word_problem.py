"""The word problem of a finite group: the product of the elements so far.

Merrill, Petty and Sabharwal 2024, arXiv 2404.08819, section 5: elements are drawn evenly and the product is due after
each. A5 and S5 are not solvable, and their word problem is complete for NC1 (Barrington 1989): models whose depth is
fixed and whose transitions are diagonal (attention, S4, Mamba) need more layers for longer words. An RNN or an LSTM is
expected to win with one layer, as are linear recurrences whose transitions depend on the input and do not commute. S3
is solvable: a small group to begin with.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import Field

from assay.data.tasks._prefix import Prefix
from assay.data.tasks._tools import always
from assay.data.tasks.base import Ids, Shortcut

Group = Literal["S3", "A5", "S5"]


@cache
def elements(group: Group) -> tuple[tuple[int, ...], ...]:
    """The permutations, in lexicographic order: element 0 is the identity. S: all of them; A: the even ones."""
    every = permutations(range(int(group[1:])))
    return tuple(p for p in every if group[0] == "S" or _even(p))


def _even(permutation: tuple[int, ...]) -> bool:
    crossed = [a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :]]
    return sum(crossed) % 2 == 0


@cache
def products(group: Group) -> Int64[Ids, "G G"]:
    """products[p, q] is the number of p q, which maps i to p[q[i]]."""
    number = {p: i for i, p in enumerate(elements(group))}
    rows = [[number[tuple(p[i] for i in q)] for q in elements(group)] for p in elements(group)]
    return np.array(rows, np.int64)


class WordProblem(Prefix):
    """Elements of `group`, each a symbol; the answer is the product x1 x2 ... xt, an element too."""

    kind: Literal["word_problem"] = "word_problem"
    length: int = Field(32, ge=2)
    group: Group = "A5"

    @property
    def vocab(self) -> int:
        return len(elements(self.group))

    @property
    def floor(self) -> float:
        """Whatever the other elements are, the last one makes all products equally likely."""
        return 1 / self.vocab

    def targets(self, inputs: Ids) -> Ids:
        """All prefixes in log2(T) rounds, of which each doubles how far back the products reach: a scan."""
        table, reach, found = products(self.group), 1, inputs
        while reach < inputs.shape[1]:
            found = np.concatenate([found[:, :reach], table[found[:, :-reach], found[:, reach:]]], 1)
            reach *= 2
        return found

    def solve(self, inputs: Ids) -> Ids:
        """One product a symbol, as a state machine does it."""
        table, answers = products(self.group), np.empty_like(inputs)
        product = np.zeros(len(inputs), np.int64)
        for place, column in enumerate(inputs.T):
            product = table[product, column]
            answers[:, place] = product
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """The last symbol is the product at the first place, and tells nothing afterwards."""
        last = (1 + (self.length - 1) * self.floor) / self.length
        return {"always the identity": always(0, self.floor), "last symbol": Shortcut(lambda x: x, last)}
