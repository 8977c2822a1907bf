"""Majority: whether more ones than zeros have been read.

The standard example of what a threshold circuit of constant depth computes and a finite automaton does not; attention
that averages evenly computes it (Merrill and Sabharwal 2022, arXiv 2207.00729), and so does a counter (an LSTM: Weiss
et al. 2018, arXiv 1805.04908). Both are expected to win; a decaying state sees the recent symbols too large.
"""

from __future__ import annotations

from math import comb
from typing import Literal

import numpy as np

from assay.data.packing import IGNORED
from assay.data.tasks._prefix import Prefix
from assay.data.tasks._tools import always
from assay.data.tasks.base import Ids, Shortcut

RECENT = 9


class Majority(Prefix):
    """Bits; the answer is the bit that stands more often so far. Asked after odd numbers of bits: there is no tie."""

    kind: Literal["majority"] = "majority"

    @property
    def vocab(self) -> int:
        return 2

    @property
    def floor(self) -> float:
        """Exchanging ones and zeros exchanges the answers, and makes a row that is as likely."""
        return 0.5

    def targets(self, inputs: Ids) -> Ids:
        ones, read = np.cumsum(inputs, 1), np.arange(1, inputs.shape[1] + 1)
        return np.where(read % 2, (2 * ones > read).astype(np.int64), IGNORED)

    def solve(self, inputs: Ids) -> Ids:
        """A counter that goes up and down."""
        return (np.cumsum(2 * inputs - 1, 1) > 0).astype(np.int64)

    def shortcuts(self) -> dict[str, Shortcut]:
        """Recent symbols alone are right more often than not: a majority does not change quickly."""
        return {
            "always 0": always(0, 0.5),
            "last symbol": Shortcut(lambda x: x, self._agreement(1)),
            f"last {RECENT} symbols": Shortcut(_recent, self._agreement(RECENT)),
        }

    def _agreement(self, window: int) -> float:
        """How often the majority of the last `window` bits (odd) is that of all, over the places that are asked."""
        asked = range(1, self.length + 1, 2)
        return sum(_agree(min(window, n), n - min(window, n)) for n in asked) / len(asked)


def _agree(inside: int, outside: int) -> float:
    """The probability that `inside` even draws (odd in number) decide as all do, with `outside` (even) further ones."""
    half = outside // 2
    tied = [comb(outside, half - d) / 2**outside for d in range(min(half, inside) + 1)]
    # By symmetry: i ones inside are more than the zeros by 2 lead + 1, so `lead` ones may be missing from half outside.
    agreed = 0.0
    for i in range(inside // 2 + 1, inside + 1):
        lead = i - (inside // 2 + 1)
        agreed += comb(inside, i) / 2**inside * (0.5 + tied[0] / 2 + sum(tied[1 : lead + 1]))
    return 2 * agreed


def _recent(inputs: Ids) -> Ids:
    ones = np.cumsum(2 * inputs - 1, 1)
    before = np.pad(ones, ((0, 0), (RECENT, 0)))[:, : inputs.shape[1]]
    return (ones > before).astype(np.int64)
