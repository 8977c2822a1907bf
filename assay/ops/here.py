"""What one part has at its own place during one call: its state, its taps, values from earlier parts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

from assay.ops.state import State

T = TypeVar("T")


@lru_cache(maxsize=4096)
def heard(name: str, listen: frozenset[str]) -> bool:
    """Whether one of the globs names this tap."""
    return any(fnmatchcase(name, glob) for glob in listen)


class Here:
    """Made by a block for one call; never crosses the block's edge. `taps` and `given` are the block's outputs."""

    __slots__ = ("given", "listen", "name", "states", "taps")

    def __init__(
        self,
        name: str,
        states: Mapping[str, State],
        given: dict[str, Any],
        taps: dict[str, Tensor],
        listen: frozenset[str],
    ) -> None:
        self.name, self.states, self.given, self.taps, self.listen = name, states, given, taps, listen

    @property
    def state(self) -> State:
        return self.states[self.name]

    def take(self, name: str) -> Any:
        """A value an earlier part gave (shared K/V, the embedding)."""
        return self.given[name]

    def give(self, name: str, value: Any) -> None:
        self.given[name] = value

    def hears(self, name: str) -> bool:
        """Whether somebody reads this tap: guard work that only a reader needs."""
        return bool(self.listen) and heard(f"{self.name}.{name}", self.listen)

    def tap(self, name: str, value: Tensor) -> Tensor:
        """Publish a value under `<place>.<name>`; free when nobody listens."""
        if self.listen and self.hears(name):
            self.taps[f"{self.name}.{name}"] = value
        return value

    def add(self, name: str, value: Tensor) -> None:
        """Publish `loss.*` or `stat.*`: the training loop always reads these two prefixes."""
        self.taps[f"{self.name}.{name}"] = value

    def piece(self, states: Mapping[str, State], given: dict[str, Any]) -> Here:
        """The same place for one piece of the step: with its memory, what was given for it, and taps of its own."""
        return Here(self.name, states, given, {}, self.listen)

    def __getitem__(self, child: str) -> Here:
        return Here(f"{self.name}.{child}", self.states, self.given, self.taps, self.listen)
