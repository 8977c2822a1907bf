"""Equal params, FLOPs or state bytes: one integer field of an arm is searched until it agrees with the base arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

from assay.study.spec import MatchSpec

Tree = dict[str, Any]
LARGEST = 1 << 20


class Sized(Protocol):
    """The part of `plan.Materials` that matching needs."""

    @property
    def model(self) -> Callable[[Any, Mapping[str, Any]], tuple[Tree, str]]: ...
    @property
    def sizes(self) -> Callable[[Tree], Mapping[str, float]] | None: ...


def matched(match: MatchSpec, base: Tree, source: Any, changes: Mapping[str, Any], materials: Sized) -> int:
    """The value of `match.tune` that brings the arm closest to the base arm; ValueError when that is not close enough.

    The quantity must not fall as the field grows. `source` with `changes` is the arm before matching.
    """
    if materials.sizes is None:
        raise ValueError(f"match: {match.equal} cannot be counted here")
    sizes = materials.sizes

    @cache
    def count(units: int) -> float:
        tree, _ = materials.model(source, {**changes, match.tune: units * match.multiple_of})
        return float(sizes(tree)[match.equal])

    target = float(sizes(base)[match.equal])
    best = nearest(count, target)
    found = count(best)
    if abs(found - target) > match.within * target:
        raise ValueError(
            f"match: {match.tune}={best * match.multiple_of} gives {found:.0f} {match.equal} against the base arm's "
            f"{target:.0f}; within {match.within:.1%} is accepted"
        )
    return best * match.multiple_of


def nearest(count: Callable[[int], float], target: float) -> int:
    """The positive integer whose count, which never falls, is nearest to the target."""
    low, high = 1, 2
    while count(high) < target:
        low, high = high, high * 2
        if high > LARGEST:
            raise ValueError(f"match: the tuned field would have to exceed {LARGEST}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda n: abs(count(n) - target))
