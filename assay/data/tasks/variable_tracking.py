"""Variable tracking: a value is set, and passed on from variable to variable; what does the last one hold?

The symbolic core of RULER's variable tracking (Hsieh et al. 2024, arXiv 2404.06654, section 3.2): chains of assignments
stand among noise, in each other's way. RULER asks for all variables that hold a value; here the last of every chain is
asked for the value it holds, one answer each. A chain of n hops takes n lookups, one behind the other: layers of
attention, or a state that looks up while it reads, which makes it one lookup a statement. Deeper models are expected to
win, and recurrent ones that recall well.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks._tools import always, at_least, behind, laid_out
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task


class VariableTracking(Task):
    """Statements (a mark, a variable, what it is set to) among blanks, then questions (another mark, a variable).

    `chains` chains: a variable is set to a value, and `hops` times another one to the one before. All variables of a
    row are different, as are its values. `symbols` variables exist, and `values` values.
    """

    kind: Literal["variable_tracking"] = "variable_tracking"
    length: int = Field(64, ge=8)
    chains: int = Field(2, ge=2)
    hops: int = Field(4, ge=1)
    symbols: int = Field(32, ge=2)
    values: int = Field(16, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        statements = self._statements
        at_least("symbols", self.symbols, statements, f"{self.chains} chains of {self.hops} hops")
        at_least("values", self.values, self.chains, f"{self.chains} chains")
        at_least(
            "length", self.length, 3 * statements + 2 * self.chains, f"{statements} statements and their questions"
        )
        return self

    @property
    def _statements(self) -> int:
        return self.chains * (self.hops + 1)

    @property
    def vocab(self) -> int:
        """Variables, values, a blank, the mark of a statement and that of a question."""
        return self.symbols + self.values + 3

    @property
    def floor(self) -> float:
        """A chain's value is drawn evenly."""
        return 1 / self.values

    @property
    def _room(self) -> int:
        """Where the questions begin."""
        return self.length - 2 * self.chains

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice, n = Dice(rows, first, self.kind_name(), seed), self._statements
        values = self.symbols + dice.choose("values", self.chains, self.values)
        variables = dice.choose("variables", n, self.symbols).reshape(rows, self.chains, self.hops + 1)
        sources = np.concatenate([values[:, :, None], variables[:, :, :-1]], 2)
        chain = dice.choose("order", n, n) % self.chains
        # A chain's statements keep their order: how many of the same chain stand before.
        link = np.tril(chain[:, :, None] == chain[:, None, :], -1).sum(2)
        row = np.arange(rows)[:, None]
        mark = np.full_like(chain, self.vocab - 2)
        statements = np.stack([mark, variables[row, chain, link], sources[row, chain, link]], 2)
        units = self._room - 2 * n
        pieces = np.full((rows, units, 3), -1, np.int64)
        pieces[:, :, 0] = self.vocab - 3
        np.put_along_axis(pieces, np.sort(dice.choose("places", n, units), 1)[:, :, None], statements, 1)
        which = dice.choose("which", self.chains, self.chains)
        asked = variables[row, which, -1]
        questions = np.stack([np.full_like(asked, self.vocab - 1), asked], 2).reshape(rows, -1)
        targets = np.full((rows, self.length), IGNORED)
        targets[:, self._room + 1 :: 2] = values[row, which]
        return Examples(np.hstack([laid_out(pieces, pieces >= 0, self._room, 0), questions]), targets)

    def solve(self, inputs: Ids) -> Ids:
        return np.array([self._run(row) for row in inputs.tolist()])

    def _run(self, row: list[int]) -> list[int]:
        """One row, executed."""
        held: dict[int, int] = {}
        for mark, variable, source in zip(row, row[1:], row[2:]):
            if mark == self.vocab - 2:
                held[variable] = held.get(source, source)
        return [held.get(symbol, 0) for symbol in row]

    def shortcuts(self) -> dict[str, Shortcut]:
        return {
            "always the same value": always(self.symbols, self.floor),
            "first value": Shortcut(lambda x: behind(x, self.vocab - 2, 2), 1 / self.chains),
            "one hop": Shortcut(self._hop, 0.0),
        }

    def _hop(self, inputs: Ids) -> Ids:
        """What stands behind the variable where it is set: another variable."""
        set_to = np.roll(inputs, -2, 1)
        place = np.argmax(
            (inputs == self.vocab - 2)[:, None] & (np.roll(inputs, -1, 1)[:, None] == inputs[:, :, None]), 2
        )
        return np.take_along_axis(set_to, place, 1)
