"""Parity: whether the ones so far are odd in number.

Delétang et al. 2022, arXiv 2207.02098, table 1 (regular); asked after every symbol. A state that alternates solves it
at any length; no fixed number of attention layers does (Hahn 2020, arXiv 1906.06755), nor do linear recurrences whose
transitions have no negative eigenvalue (Grazzi et al. 2024, arXiv 2411.12537). An LSTM is expected to win, and to go on
at lengths that it was not trained on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from assay.data.tasks._prefix import Prefix
from assay.data.tasks._tools import always
from assay.data.tasks.base import Ids, Shortcut


class Parity(Prefix):
    """Bits; the answer is 1 where an odd number of ones has been read."""

    kind: Literal["parity"] = "parity"

    @property
    def vocab(self) -> int:
        return 2

    @property
    def floor(self) -> float:
        """Whatever the other bits are, the last one makes both answers equally likely."""
        return 0.5

    def targets(self, inputs: Ids) -> Ids:
        return np.cumsum(inputs, 1) % 2

    def solve(self, inputs: Ids) -> Ids:
        return np.bitwise_xor.accumulate(inputs, axis=1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """The parity of the last bits is right at the first places, and there only."""
        return {
            "always 0": always(0, 0.5),
            "last symbol": Shortcut(lambda x: x, (1 + (self.length - 1) / 2) / self.length),
            "last two symbols": Shortcut(_last_two, (2 + (self.length - 2) / 2) / self.length),
        }


def _last_two(inputs: Ids) -> Ids:
    return inputs ^ np.pad(inputs, ((0, 0), (1, 0)))[:, :-1]
