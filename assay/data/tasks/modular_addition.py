"""Modular addition: the sum so far, modulo m.

Delétang et al. 2022, arXiv 2207.02098, table 1 (modular arithmetic without brackets, m = 5, cut down to sums); asked
after every symbol. The word problem of a cyclic group: a state that turns by an angle for every symbol solves it at any
length (complex or negative transitions); gates between 0 and 1 and softmax attention are expected to fail beyond the
lengths that they were trained on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from assay.data.tasks._prefix import Prefix
from assay.data.tasks._tools import always
from assay.data.tasks.base import Ids, Shortcut


class ModularAddition(Prefix):
    """Numbers below `modulus`; the answer is their sum so far, modulo it."""

    kind: Literal["modular_addition"] = "modular_addition"
    modulus: int = Field(5, ge=2)

    @property
    def vocab(self) -> int:
        return self.modulus

    @property
    def floor(self) -> float:
        """Whatever the other numbers are, the last one makes all sums equally likely."""
        return 1 / self.modulus

    def targets(self, inputs: Ids) -> Ids:
        return np.cumsum(inputs, 1) % self.modulus

    def solve(self, inputs: Ids) -> Ids:
        """One addition a symbol, as a state machine does it."""
        answers, total = np.empty_like(inputs), np.zeros(len(inputs), np.int64)
        for place, column in enumerate(inputs.T):
            total = (total + column) % self.modulus
            answers[:, place] = total
        return answers

    def shortcuts(self) -> dict[str, Shortcut]:
        """The last symbol is the sum at the first place, and tells nothing afterwards."""
        last = (1 + (self.length - 1) * self.floor) / self.length
        return {"always 0": always(0, self.floor), "last symbol": Shortcut(lambda x: x, last)}
