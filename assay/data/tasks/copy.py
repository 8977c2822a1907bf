"""Copying: a string, a mark, and the string again.

Jelassi et al. 2024, arXiv 2402.01032, section 2: strings of drawn lengths, continued symbol by symbol. Attention is
expected to win and to go on at longer strings; a state of fixed size must hold the string, and fails from some length
on.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from assay.data.tasks._strings import Strings
from assay.data.tasks._tools import always, followed
from assay.data.tasks.base import Examples, Ids, Shortcut


class Copy(Strings):
    """Strings of `least` symbols to as many as fit twice, with a mark between string and copy; the rest is filled."""

    kind: Literal["copy"] = "copy"
    length: int = Field(64, ge=2)
    twice: ClassVar[str] = " and their copies"

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        return self.said(rows, seed, first, backwards=False)[0]

    def solve(self, inputs: Ids) -> Ids:
        """The copy stands one symbol and the string behind the string."""
        size = np.argmax(inputs == self.symbols, axis=1)[:, None]
        return np.take_along_axis(inputs, np.maximum(np.arange(self.length) - size, 0), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        return {
            "always 0": always(0, self.floor),
            "what followed this symbol last": Shortcut(lambda x: followed(x, self.vocab), self._by_symbol),
        }

    @property
    def _by_symbol(self) -> float:
        """Right where the symbol stands nowhere else in the string, and otherwise by chance; never at the mark, whose
        answer is 0 then."""
        sizes = range(self.least, self.most + 1)
        alone = sum((n - 1) * (1 - self.floor) ** (n - 1) for n in sizes)
        asked = sum(sizes)
        return (alone + (asked - alone) * self.floor) / asked
