"""Tasks that ask, at every place, for something about all symbols so far."""

from __future__ import annotations

from abc import abstractmethod

from assay.data.tasks.base import Dice, Examples, Ids, Task


class Prefix(Task):
    """Symbols drawn evenly and independently. A row that is longer is nothing but longer."""

    @abstractmethod
    def targets(self, inputs: Ids) -> Ids:
        """What is due after every prefix."""

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        inputs = Dice(rows, first, self.kind_name(), seed).below("symbols", self.length, self.vocab)
        return Examples(inputs, self.targets(inputs))
