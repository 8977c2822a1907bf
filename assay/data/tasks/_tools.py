"""What several tasks need: rows from pieces, questions about the next symbol, different draws, and simple answers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from assay.data.packing import IGNORED
from assay.data.tasks.base import Dice, Examples, Flags, Ids, Shortcut, Solver, Task

Column = Int64[Ids, "R 1"]
Some = Int64[Ids, "R n"]


def at_least(name: str, value: int, least: int, what: str) -> None:
    """Raise ValueError for a size that is too small for `what` (plural: "3 pairs")."""
    if value < least:
        raise ValueError(f"{name}: {value}; {what} need {least} or more")


def countable(name: str, symbols: int, size: int) -> int:
    """How many strings of `size` symbols there are; ValueError for more than have a number of 63 bits."""
    if symbols**size >= 1 << 63:
        raise ValueError(f"{name}: {symbols}; accepted for strings of {size}: fewer than 2^63 different ones")
    return symbols**size


def next_symbol(tokens: Ids, asked: Bool[Flags, "R T"]) -> Examples:
    """Rows [R, T+1] to be continued: where `asked`, a token is the answer that is due before it is read."""
    return Examples(tokens[:, :-1], np.where(asked[:, 1:], tokens[:, 1:], IGNORED))


def laid_out(pieces: NDArray[np.int64], present: NDArray[np.bool_], length: int, rest: int) -> Ids:
    """The present ones of `pieces` [R, ...] in order, `length` to a row; `rest` fills up, and what is beyond is cut."""
    flat, mask = pieces.reshape(len(pieces), -1), present.reshape(len(pieces), -1)
    place = np.cumsum(mask, 1) - 1
    mask = mask & (place < length)
    rows = np.full((len(flat), length), rest, np.int64)
    rows[np.nonzero(mask)[0], place[mask]] = flat[mask]
    return rows


def earlier(inputs: Ids, symbols: int) -> Int64[Ids, "R T"]:
    """The last place before each that holds the same symbol; -1 where none does."""
    rows = np.arange(len(inputs))
    seen = np.full((len(inputs), symbols), -1, np.int64)
    found = np.empty_like(inputs)
    for place, column in enumerate(inputs.T):
        found[:, place] = seen[rows, column]
        seen[rows, column] = place
    return found


def followed(inputs: Ids, symbols: int) -> Ids:
    """What stood behind the last earlier occurrence of the symbol at each place, its first occurrence apart (there 0):
    what an induction head answers (Olsson et al. 2022, arXiv 2209.11895)."""
    before = earlier(inputs, symbols)
    return np.where(before < 0, 0, np.take_along_axis(inputs, before + 1, 1))


def different(dice: Dice, name: str, n: int, high: int) -> Some:
    """n different ones of 0 .. high-1 as `Dice.choose`, also where high is in the millions.

    Those that stood before in their row are drawn again until none is left. The procedure treats all numbers alike, so
    every sequence of n different ones is equally likely.
    """
    if high <= 4 * n:
        return dice.choose(name, n, high)
    drawn, attempt = dice.below(name, n, high), 0
    while (again := repeats(drawn)).any():
        attempt += 1
        drawn = np.where(again, dice.below(f"{name}, attempt {attempt}", n, high), drawn)
    return drawn


def repeats(rows: Some) -> Bool[Flags, "R n"]:
    """Where a number stands that stood before in its row."""
    order = np.argsort(rows, axis=1, kind="stable")
    same = np.diff(np.take_along_axis(rows, order, 1), axis=1, prepend=-1) == 0
    found = np.zeros_like(same)
    np.put_along_axis(found, order, same, 1)
    return found


def always(symbol: int, at_most: float) -> Shortcut:
    """The same answer everywhere."""
    return Shortcut(lambda inputs: np.full_like(inputs, symbol), at_most)


def tried(task: Task, answer: Solver, symbols: int = 1 << 18) -> Shortcut:
    """One whose mean has no formula: what it reached in rows of so many symbols in all, of a stream of their own, and 4
    standard errors (what is asked in one row may hang together)."""
    examples = task.draw(max(64, min(2000, symbols // task.length)), seed=-1)
    asked, right = examples.asked.sum(1), ((answer(examples.inputs) == examples.targets) & examples.asked).sum(1)
    share = right.sum() / asked.sum()
    error = np.sqrt(((right - share * asked) ** 2).sum()) / asked.sum()
    return Shortcut(answer, min(1.0, float(share + 4 * error)))


def told(column: Column, inputs: Ids) -> Ids:
    """One answer a row, at all its places."""
    return np.broadcast_to(column, inputs.shape)


def behind(inputs: Ids, mark: int, steps: int) -> Ids:
    """What stands so many places behind the first mark of a row, at all its places."""
    first = np.argmax(inputs == mark, axis=1)[:, None]
    return told(np.take_along_axis(inputs, first + steps, 1), inputs)
