"""What a diagnostic task is: rows of symbols with answers, a solver that is always right, and solvers that must fail.

One file of this folder is one task: a class derived from `Task` with a `kind` of its own. No list names it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from assay.data.draws import scatter
from assay.data.packing import IGNORED
from assay.spec.base import NestedError, Spec
from assay.spec.registry import user_kinds, user_modules

# Spelled out: numpy 2.5's NDArray is an alias that jaxtyping does not take for an array's type.
Ids = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Solver = Callable[[Ids], Ids]
"""inputs [R, T] -> an answer at every place; only those at places that are asked count."""


@dataclass(frozen=True)
class Examples:
    """R rows: inputs [R, T]; targets [R, T], the answer that is due after reading the input at the same place, and
    IGNORED where nothing is asked. A target is not the next input: what follows a question may be another question.
    prefix [R]: how many symbols of a row are a source that comes whole, whose last one is asked what follows it; None:
    rows have none."""

    inputs: Ids
    targets: Ids
    prefix: Ids | None = None

    @property
    def asked(self) -> NDArray[np.bool_]:
        return self.targets != IGNORED

    def accuracy(self, answers: Ids) -> float:
        """The share of what is asked that is answered right, every answer counting once."""
        return float((answers == self.targets)[self.asked].mean())


@dataclass(frozen=True)
class Shortcut:
    """A way to answer without the mechanism that the task is about, and the most that it reaches on average."""

    answer: Solver
    at_most: float


class Task(Spec):
    """A task and its sizes. `length`: symbols in a row. Sizes that cannot be are a ValueError that names the field.

    Rows are drawn from the seed and the row's number alone (`Dice`), so however a stream of rows is cut into batches,
    they are the same rows.
    """

    length: int = Field(64, ge=2)

    @property
    def vocab(self) -> int:
        """How many symbols there are: inputs and targets are 0 .. vocab-1."""
        raise NotImplementedError(f"{type(self).__name__} needs vocab")

    @property
    def floor(self) -> float:
        """The best accuracy of who has not seen the context. Its docstring says why it is that."""
        raise NotImplementedError(f"{type(self).__name__} needs floor")

    def draw(self, rows: int, seed: int, first: int = 0) -> Examples:
        """Rows number `first` .. `first + rows - 1` of the stream of this seed."""
        raise NotImplementedError(f"{type(self).__name__} needs draw")

    def solve(self, inputs: Ids) -> Ids:
        """The oracle: from the inputs alone, right wherever something is asked, and at a place from what stands up to
        it. Anything at the other places."""
        raise NotImplementedError(f"{type(self).__name__} needs solve")

    def shortcuts(self) -> Mapping[str, Shortcut]:
        """Ways to answer that must not solve the task."""
        raise NotImplementedError(f"{type(self).__name__} needs shortcuts")

    def longer(self, factor: int) -> Self:
        """The task with rows `factor` times as long over the same symbols: what a model that was trained on this one is
        asked to generalise to. ValueError where the symbols do not suffice. What grows besides the rows, a task says
        itself."""
        return self.resized(length=self.length * factor)

    def resized(self, **changes: Any) -> Self:
        """The task with other sizes, which are checked as if they had been given."""
        return type(self).model_validate({**self.model_dump(), **changes})

    @classmethod
    def kind_name(cls) -> str:
        return str(get_args(cls.model_fields["kind"].annotation)[0])


class Dice:
    """Random arrays [R, ...] for rows `first` .. `first + rows - 1`: row r depends on the key and on its number alone.

    What is drawn under two names is independent. key: the task's kind, the seed.
    """

    def __init__(self, rows: int, first: int, *key: int | str) -> None:
        if rows < 1 or first < 0:
            raise ValueError(f"rows: {rows}, first: {first}; accepted: from 1 and from 0 on")
        self._rows = np.arange(first, first + rows, dtype=np.uint64)
        self._key = key

    def __len__(self) -> int:
        return len(self._rows)

    def bits(self, name: str, n: int) -> NDArray[np.uint64]:
        """[R, n], 64 random bits each. ValueError for an n of 2^24 or more: rows would share draws."""
        if n >= 1 << 24:
            raise ValueError(f"{n} draws a row; accepted: fewer than 2^24")
        # The increment is SplitMix64's: consecutive integers must not enter the finaliser as neighbours.
        number = (self._rows[:, None] << np.uint64(24)) | np.arange(n, dtype=np.uint64)
        return scatter(number * np.uint64(0x9E3779B97F4A7C15), *self._key, name)

    def below(self, name: str, n: int, high: int) -> Ids:
        """[R, n], evenly from 0 .. high-1, with replacement."""
        return (self.bits(name, n) % np.uint64(high)).astype(np.int64)

    def choose(self, name: str, n: int, high: int) -> Ids:
        """[R, n], n different ones of 0 .. high-1 in random order; all of them where n is high: a permutation."""
        return np.argsort(self.bits(name, high), axis=1, kind="stable")[:, :n].astype(np.int64)

    def share(self, name: str, n: int) -> NDArray[np.float64]:
        """[R, n], evenly from 0 to below 1."""
        return (self.bits(name, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def place_in(rows: Ids, wanted: Ids) -> Ids:
    """[R, T]: the last place in a row of `rows` [R, S] that holds what stands in that of `wanted` [R, T]; or -1."""
    size = rows.shape[1]
    found = rows[:, ::-1][:, None, :] == wanted[:, :, None]
    return np.where(found.any(2), size - 1 - found.argmax(2), -1).astype(np.int64)


@cache
def _shipped() -> Mapping[str, type[Task]]:
    table: dict[str, type[Task]] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = importlib.import_module(f"assay.data.tasks.{path.stem}")
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, Task) and found.__module__ == module.__name__ and "kind" in found.model_fields:
                if found.kind_name() in table:
                    raise ValueError(f"{path}: kind {found.kind_name()!r} is already taken")
                table[found.kind_name()] = found
    return MappingProxyType(table)


def tasks() -> Mapping[str, type[Task]]:
    """kind -> task, for every file of this folder, and for the users' files that are loaded (--part)."""
    table = dict(_shipped())
    for module in user_modules():
        for found in user_kinds(module):
            if issubclass(found, Task):
                if found.kind_name() in table:
                    raise ValueError(f"--part {module.__file__}: kind {found.kind_name()!r} is already taken")
                table[found.kind_name()] = found
    return MappingProxyType(table)


def task_class(kind: Any) -> type[Task]:
    """The task of this kind; ValueError with the accepted ones and the nearest."""
    known = tasks()
    if isinstance(kind, str) and kind in known:
        return known[kind]
    near = difflib.get_close_matches(str(kind), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise NestedError(("kind",), f"unknown task {kind!r}{hint}; accepted: {', '.join(sorted(known))}")
