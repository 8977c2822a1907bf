"""Multi-query associative recall: pairs of a key and a value, then keys, each to be answered with its value.

Arora et al. 2023 (Zoology), arXiv 2312.04927, section 3.1 and appendix A: `k1 v1 ... kn vn`, then queries; keys and
values come without replacement from the two halves of the symbols.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from assay.data.packing import IGNORED
from assay.data.tasks.base import Dice, Examples, Ids, Shortcut, Task, place_in


class Mqar(Task):
    """`pairs` pairs of symbols, then questions up to `length`.

    queries: `dense` asks a key, evenly drawn, at every place that is left: many labels a row. `spaced` asks every key
    once, at even distances behind the pairs that a power law draws (density a x^(a-1), a = power, as the paper's
    generator), and any symbol stands between.
    rewrites: so many of the pairs give a key that stood before another value: the last one counts.
    parts: 2 makes a key of two symbols, neither of which tells it alone: of a grid of keys a row uses `pairs`.

    Attention solves it with one lookup. A state of fixed size must hold all pairs: at least pairs x log2(values) bits,
    and a linear one of width f tells at most f keys apart.
    """

    kind: Literal["mqar"] = "mqar"
    length: int = Field(64, ge=8)
    pairs: int = Field(16, ge=2)
    symbols: int = Field(256, ge=4)
    queries: Literal["dense", "spaced"] = "dense"
    power: float = Field(0.01, gt=0.0)
    rewrites: int = Field(0, ge=0)
    parts: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        least = self.pairs * (3 * self.parts + 1)
        if self.length < least:
            raise ValueError(f"length: {self.length}; {self.pairs} pairs, each asked, need {least} or more")
        if self.queries == "dense" and self.power != type(self).model_fields["power"].default:
            raise ValueError(f"power: {self.power}; dense queries do not read it: leave it out")
        fewest = 1 if self.parts == 1 else 4
        if self.distinct < fewest:
            raise ValueError(f"rewrites: {self.rewrites} of {self.pairs} pairs; accepted: {fewest} fewer, or less")
        least = max(2 * self.pairs, 4 * self.side if self.parts == 2 else 0)
        if self.symbols < least:
            raise ValueError(f"symbols: {self.symbols}; {self.pairs} pairs need {least} or more")
        return self

    @property
    def distinct(self) -> int:
        """How many keys a row has."""
        return self.pairs - self.rewrites

    @property
    def side(self) -> int:
        """How many first, and how many second, symbols the keys of a row have where a key has two."""
        return math.isqrt(self.distinct - 1) + 1

    @property
    def vocab(self) -> int:
        return self.symbols

    @property
    def floor(self) -> float:
        """Every value is equally likely to have been given to a key: one in half the symbols."""
        return 1 / (self.symbols - self.symbols // 2)

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        dice = Dice(rows, first, "mqar", seed)
        slots, latest = self._slots(dice)
        half = self.symbols // 2
        values = half + dice.choose("values", self.pairs, self.symbols - half)
        keys = self._keys(dice)
        told = np.concatenate([np.take_along_axis(keys, slots[:, :, None], 1), values[:, :, None]], 2)
        asked, which = self._asked(dice)
        size = asked.shape[1]
        symbols = dice.below("between", size * self.parts, self.symbols).reshape(rows, size, self.parts)
        symbols = np.where(asked[:, :, None], np.take_along_axis(keys, which[:, :, None], 1), symbols)
        answers = np.full((rows, size, self.parts), IGNORED)
        given = np.take_along_axis(values, np.take_along_axis(latest, which, 1), 1)
        answers[:, :, -1] = np.where(asked, given, IGNORED)
        return self._joined(told, symbols, answers)

    def _joined(self, told: NDArray[np.int64], symbols: NDArray[np.int64], answers: NDArray[np.int64]) -> Examples:
        """Pairs [R, n, parts+1] and questions [R, m, parts], cut or filled to `length`."""
        rows, unasked = len(told), np.full((len(told), self._tokens), IGNORED)
        spare = np.zeros((rows, self.length - self._tokens - symbols[0].size), np.int64)
        inputs = np.concatenate([told.reshape(rows, -1), symbols.reshape(rows, -1), spare], 1)
        targets = np.concatenate([unasked, answers.reshape(rows, -1), spare + IGNORED], 1)
        return Examples(inputs, targets)

    @property
    def _tokens(self) -> int:
        """Symbols that the pairs take."""
        return self.pairs * (self.parts + 1)

    def _slots(self, dice: Dice) -> tuple[Ids, Ids]:
        """Which key each pair gives a value to [R, n], and for each key the last pair that does [R, keys]."""
        every = np.broadcast_to(np.arange(self.distinct), (len(dice), self.distinct))
        again = dice.below("again", self.rewrites, self.distinct)
        given = np.concatenate([every, again], 1)
        slots = np.take_along_axis(given, dice.choose("order", self.pairs, self.pairs), 1)
        return slots, place_in(slots, every)

    def _keys(self, dice: Dice) -> NDArray[np.int64]:
        """[R, keys, parts]."""
        half = self.symbols // 2
        if self.parts == 1:
            return dice.choose("keys", self.distinct, half)[:, :, None]
        left, right = dice.choose("left", self.side, half // 2), dice.choose("right", self.side, half - half // 2)
        cells = dice.choose("cells", self.distinct, self.side**2)
        firsts = np.take_along_axis(left, cells // self.side, 1)
        return np.stack([firsts, half // 2 + np.take_along_axis(right, cells % self.side, 1)], 2)

    def _asked(self, dice: Dice) -> tuple[NDArray[np.bool_], Ids]:
        """Where behind the pairs a key is asked, and which: both [R, m], a place for every key's symbols."""
        room = (self.length - self._tokens) // self.parts
        if self.queries == "dense":
            return np.ones((len(dice), room), np.bool_), dice.below("which", room, self.distinct)
        # Without replacement by weights: the smallest of exponential waiting times (Efraimidis and Spirakis 2006).
        gaps = np.arange(1, room // 2 + 1, dtype=np.float64)
        wait = -np.log1p(-dice.share("gaps", len(gaps))) / gaps ** (self.power - 1)
        places = 2 * np.argsort(wait, axis=1, kind="stable")[:, : self.distinct]
        asked, which = np.zeros((len(dice), room), np.bool_), np.zeros((len(dice), room), np.int64)
        np.put_along_axis(asked, places, True, 1)
        np.put_along_axis(which, places, np.broadcast_to(np.arange(self.distinct), places.shape), 1)
        return asked, which

    def _pairs_of(self, inputs: Ids) -> tuple[NDArray[np.int64], Ids]:
        """The keys [R, n, parts] and values [R, n] of rows."""
        told = inputs[:, : self._tokens].reshape(len(inputs), self.pairs, self.parts + 1)
        return told[:, :, :-1], told[:, :, -1]

    def _numbers(self, keys: NDArray[np.int64]) -> Ids:
        """[R, n]: a number for each key of [R, n, parts]."""
        return keys @ self.symbols ** np.arange(self.parts)[::-1]

    def _questions(self, inputs: Ids) -> Ids:
        """[R, T]: the number of the key that ends at each place."""
        return inputs if self.parts == 1 else np.roll(inputs, 1, 1) * self.symbols + inputs

    def solve(self, inputs: Ids) -> Ids:
        keys, values = self._pairs_of(inputs)
        return np.take_along_axis(values, place_in(self._numbers(keys), self._questions(inputs)), 1)

    def shortcuts(self) -> dict[str, Shortcut]:
        """Each answers with a value of the row, which excludes most of the others."""
        found = {
            "last value": Shortcut(lambda x: self._value(x, -1), 1 / self.distinct),
            "first value": Shortcut(lambda x: self._value(x, 0), 1 / self.distinct),
        }
        if self.rewrites:
            found["first value of the key"] = Shortcut(self._stale, (1 - 1 / self.distinct) ** self.rewrites)
        if self.parts == 2:
            found["the key's second symbol"] = Shortcut(self._half_key, self.side / self.distinct)
        return found

    def _value(self, inputs: Ids, pair: int) -> Ids:
        return np.broadcast_to(self._pairs_of(inputs)[1][:, [pair]], inputs.shape)

    def _stale(self, inputs: Ids) -> Ids:
        """The value that the key was given first."""
        keys, values = self._pairs_of(inputs)
        found = place_in(self._numbers(keys)[:, ::-1], self._questions(inputs))
        return np.take_along_axis(values[:, ::-1], found, 1)

    def _half_key(self, inputs: Ids) -> Ids:
        """The last value of any key with the same second symbol."""
        keys, values = self._pairs_of(inputs)
        return np.take_along_axis(values, place_in(keys[:, :, -1], inputs), 1)

    def longer(self, factor: int) -> Self:
        """As many times the pairs."""
        sizes = {name: getattr(self, name) * factor for name in ("length", "pairs", "rewrites")}
        return self.resized(**sizes)
