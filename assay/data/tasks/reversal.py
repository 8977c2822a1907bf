"""Reversal: a string, a mark, and the string backwards.

Delétang et al. 2022, arXiv 2207.02098, table 1 ("Reverse String"): a stack does it at any length. The string and the
mark are a prefix: an encoder reads them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from assay.data.tasks._strings import Strings
from assay.data.tasks._tools import always, followed
from assay.data.tasks.base import Examples, Ids, Shortcut


class Reversal(Strings):
    """Strings of `least` symbols to as many as fit twice, with a mark between string and answer; the rest is filled."""

    kind: Literal["reversal"] = "reversal"
    length: int = Field(32, ge=2)
    twice: ClassVar[str] = ", there and back,"

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        found, size = self.said(rows, seed, first, backwards=True)
        return Examples(found.inputs, found.targets, size + 1)

    def solve(self, inputs: Ids) -> Ids:
        """The answer t places behind the mark stands t + 1 places before it."""
        size = np.argmax(inputs == self.symbols, axis=1)[:, None]
        return np.take_along_axis(inputs, np.clip(2 * size - 1 - np.arange(self.length), 0, self.length - 1), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """What followed a symbol in the string precedes it in the answer: by chance it is the symbol behind, too."""
        follows = Shortcut(lambda x: followed(x, self.vocab), self.floor)
        return {"always 0": always(0, self.floor), "what followed this symbol last": follows}
