"""Everything that a set of runs says of scale: three ways to the best size, with intervals, and a prediction that is
checked on runs that were held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from assay.laws.isoflop import Best, Power, envelope, power, redrawn, rung_bests
from assay.laws.law import Law, Objective, bootstrap, fit, interval, misses
from assay.laws.points import Array, Points, counts_of, from_rows

Rows = Sequence[Mapping[str, Any]]
APPROACHES: Mapping[str, Callable[[Points], list[Best]]] = {"approach1": envelope, "approach2": rung_bests}
FEW = 0.5
"""Where less than this share of the draws has a law, the runs do not determine one."""


@dataclass(frozen=True)
class Options:
    """count: how parameters are counted (`points.COUNTS`). draws: of every bootstrap. level: of every interval."""

    count: str = "total"
    draws: int = 200
    level: float = 0.9
    seed: int = 0
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True)
class Fitted:
    """A law with the laws of its resamples, and the spread of the log losses about it."""

    points: Points
    law: Law
    draws: tuple[Law, ...]
    options: Options

    @property
    def spread(self) -> float:
        """Of the log losses, with the five constants taken off the count of runs."""
        return math.sqrt(float((misses(self.law, self.points) ** 2).sum()) / max(1, len(self.points) - 5))

    def interval(self, value: Callable[[Law], float]) -> tuple[float, float] | None:
        """Of anything that a law says; None where too few resamples have a law."""
        if len(self.draws) < FEW * self.options.draws:
            return None
        return interval([value(law) for law in self.draws], self.options.level)

    def constants(self) -> dict[str, Any]:
        """Each constant and the exponent of the best size, with its interval."""
        ways = {name: attrgetter(name) for name in (*self.law.as_json(), "exponent")}
        return {name: {"value": way(self.law), "interval": self.interval(way)} for name, way in ways.items()}


def fitted(points: Points, options: Options) -> Fitted:
    law = fit(points, options.objective)
    return Fitted(points, law, tuple(bootstrap(points, law, options.draws, options.seed, options.objective)), options)


@dataclass(frozen=True)
class Prediction:
    """Of runs that the law has not seen: loss in nats with its interval, each beside what was found where known."""

    points: Points
    predicted: Array
    low: Array | None
    high: Array | None

    @property
    def misses(self) -> Array:
        """Predicted minus found, in nats."""
        return self.predicted - self.points.loss

    def rows(self) -> list[dict[str, Any]]:
        p, ends = self.points, (self.low, self.high)
        return [
            {
                "params": float(p.params[i]),
                "tokens": float(p.tokens[i]),
                "flops": float(p.flops[i]),
                "loss_nats": float(p.loss[i]),
                "predicted_nats": float(self.predicted[i]),
                "low_nats": float(ends[0][i]) if ends[0] is not None else None,
                "high_nats": float(ends[1][i]) if ends[1] is not None else None,
                "miss_nats": float(self.misses[i]),
            }
            for i in range(len(p))
        ]


def predict(law: Fitted, points: Points) -> Prediction:
    """The interval is of the law's loss, without a single run's scatter about it."""
    said = law.law.loss(points.params, points.tokens)
    draws = np.array([one.loss(points.params, points.tokens) for one in law.draws])
    if len(draws) < max(20, FEW * law.options.draws):
        return Prediction(points, said, None, None)
    ends = (1 - law.options.level) / 2
    low, high = np.quantile(draws, [ends, 1 - ends], axis=0)
    return Prediction(points, said, low, high)


def held_out(points: Points, options: Options) -> tuple[Fitted, Prediction]:
    """The runs of the largest budget, predicted by the law of all others. ValueError where the others have none."""
    top = points.largest
    law = fitted(points.take(~top), options)
    return law, predict(law, points.take(top))


def analyse(rows: Rows, options: Options | None = None, where: str = "points") -> dict[str, Any]:
    """What `assay laws fit` prints: `approach3` (constants), `approach1` and `approach2` (power laws; null with the
    reason in `left_out`), `held_out`, and the exponents by every way of counting parameters that the rows allow."""
    options = options or Options()
    points = from_rows(rows, options.count, where)
    whole = fitted(points, options)
    out: dict[str, Any] = {
        "runs": len(points),
        "count": options.count,
        "level": options.level,
        "draws": options.draws,
        "flops": [float(points.flops.min()), float(points.flops.max())],
        "approach3": {"constants": whole.constants(), "spread": whole.spread, "laws": len(whole.draws)},
        "left_out": {},
    }
    for name in APPROACHES:
        out[name], why = approach(name, points, whole.spread, options)
        if why:
            out["left_out"][name] = why
    try:
        out["held_out"] = summary(held_out(points, options)[1])
    except ValueError as error:
        out["held_out"], out["left_out"]["held_out"] = None, str(error)
    own = {name: out[name]["exponent"]["value"] if out[name] else None for name in APPROACHES}
    out["exponents"] = {
        count: {**own, "approach3": whole.law.exponent} if count == options.count else exponents(rows, count, options)
        for count in counts_of(rows)
    }
    return out


def approach(name: str, points: Points, spread: float, options: Options) -> tuple[dict[str, Any] | None, str]:
    """A power law with intervals, or None and the reason."""
    try:
        found = power(APPROACHES[name](points))
    except ValueError as error:
        return None, str(error)
    again = redrawn(points, APPROACHES[name], spread, options.draws, options.seed)
    known = again if len(again) >= FEW * options.draws else []

    def told(value: Callable[[Power], float]) -> dict[str, Any]:
        return {"value": value(found), "interval": interval([value(x) for x in known], options.level)}

    lines = {
        "exponent": told(lambda x: x.params[1]),
        "tokens_exponent": told(lambda x: x.tokens[1]),
        "scale": told(lambda x: x.params[0]),
    }
    return {**lines, "bests": [asdict(best) for best in found.bests]}, ""


def exponents(rows: Rows, count: str, options: Options) -> dict[str, float | None]:
    """The exponent of the best size in FLOPs by each approach, for one way of counting."""
    points = from_rows(rows, count)
    out: dict[str, float | None] = {}
    for name in APPROACHES:
        try:
            out[name] = power(APPROACHES[name](points)).exponent
        except ValueError:
            out[name] = None
    try:
        out["approach3"] = fit(points, options.objective).exponent
    except ValueError:
        out["approach3"] = None
    return out


def summary(found: Prediction) -> dict[str, Any]:
    """The rows of a prediction, and how far off it was."""
    return {
        "rows": found.rows(),
        "mean_miss_nats": float(np.abs(found.misses).mean()),
        "worst_miss_nats": float(np.abs(found.misses).max()),
    }
