"""The best size at each budget of FLOPs, and its power law (Hoffmann et al. 2022, arXiv 2203.15556, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from assay.laws.points import Array, Points

LEAST = 3
"""Sizes that a parabola, and budgets that a power law with a spread, need."""


@dataclass(frozen=True)
class Best:
    """What one budget buys at its best. inside: the best size lies between the smallest and the largest tried."""

    flops: float
    params: float
    tokens: float
    loss: float
    inside: bool = True


@dataclass(frozen=True)
class Power:
    """params = scale * flops^exponent, and tokens with exponents of their own."""

    params: tuple[float, float]
    tokens: tuple[float, float]
    bests: tuple[Best, ...]

    @property
    def exponent(self) -> float:
        return self.params[1]

    def best_params(self, flops: float) -> float:
        return float(self.params[0] * flops ** self.params[1])

    def best_tokens(self, flops: float) -> float:
        return float(self.tokens[0] * flops ** self.tokens[1])


def power(bests: list[Best]) -> Power:
    """Least squares in logarithms. ValueError for fewer than two budgets."""
    if len(bests) < 2:
        raise ValueError(f"{len(bests)} budgets with a best size; a power law needs 2 or more")
    x = np.log([one.flops for one in bests])
    lines = []
    for values in ([one.params for one in bests], [one.tokens for one in bests]):
        slope, offset = np.polyfit(x, np.log(values), 1)
        lines.append((math.exp(offset), float(slope)))
    return Power(lines[0], lines[1], tuple(bests))


def parabola(points: Points) -> Best | None:
    """The lowest point of the parabola through a rung's losses in log size; None for fewer than three sizes, and where
    it has no lowest point. Tokens at that size: a line through the rung's in logarithms."""
    if len(np.unique(points.params)) < LEAST:
        return None
    x, y = np.log(points.params), points.loss
    centre = x.mean()
    bend, slope, offset = np.polyfit(x - centre, y, 2)
    if bend <= 0:
        return None
    at = -slope / (2 * bend)
    tokens = np.polyval(np.polyfit(x - centre, np.log(points.tokens), 1), at)
    inside = bool(x.min() <= at + centre <= x.max())
    flops = math.exp(float(np.log(points.flops).mean()))
    size = float(np.clip(at + centre, -50.0, 100.0))
    return Best(flops, math.exp(size), math.exp(float(tokens)), float(offset - slope**2 / (4 * bend)), inside)


def rung_bests(points: Points) -> list[Best]:
    """Approach 2: the lowest point of each rung that has one between its sizes. A point beyond the sizes that were
    tried is a guess of the parabola, and would pull the power law."""
    found = [parabola(points.take(rung)) for rung in points.rungs]
    return [best for best in found if best is not None and best.inside]


def envelope(points: Points, count: int = 60) -> list[Best]:
    """Approach 1: for `count` budgets over the range, the size whose loss is lowest there.

    A size's loss between its own runs is a line in logarithms, so every run must be one that ended there with its rate
    decayed; a run's loss on the way, at a high rate, is no loss of a shorter run. Budgets that fewer than two sizes
    reach are left out, and so are those whose lowest is a line's end that others have not reached.
    """
    lines = _lines(points)
    if len(lines) < 2:
        return []
    low, high = np.log(points.flops.min()), np.log(points.flops.max())
    found = []
    for at in np.linspace(low, high, count):
        here = [(np.interp(at, x, y), size, x, t) for size, x, y, t in lines if x[0] <= at <= x[-1]]
        if len(here) < 2:
            continue
        loss, size, x, tokens = min(here, key=lambda one: float(one[0]))
        sizes = [one[1] for one in here]
        inside = min(sizes) < size < max(sizes)
        found.append(Best(math.exp(at), size, math.exp(np.interp(at, x, tokens)), math.exp(loss), inside))
    return [best for best in found if best.inside]


def _lines(points: Points) -> list[tuple[float, Array, Array, Array]]:
    """For each size with two runs or more: log FLOPs, rising, with log loss and log tokens."""
    lines = []
    for size in np.unique(points.params):
        own = points.take(points.params == size)
        order = np.argsort(own.flops)
        if len(own) > 1:
            flops, loss, tokens = (np.log(values[order]) for values in (own.flops, own.loss, own.tokens))
            lines.append((float(size), flops, loss, tokens))
    return lines


def redrawn(
    points: Points, bests: Callable[[Points], list[Best]], spread: float, draws: int, seed: int = 0
) -> list[Power]:
    """Power laws of the same runs with losses that scatter by `spread` (of the log loss): what noise alone does to
    the exponents. A resample of runs would leave rungs with too few sizes."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        noise = generator.normal(0.0, spread, len(points))
        try:
            found.append(power(bests(points.with_loss(points.loss * np.exp(noise)))))
        except ValueError:
            continue
    return found
