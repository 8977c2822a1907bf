"""What to train with a budget of FLOPs: size, tokens, rate, batch, and what it costs to be wrong about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from scipy.optimize import brentq

from assay.laws.fits import Fitted, Options, fitted
from assay.laws.law import PER_TOKEN, Law, interval
from assay.laws.points import Points, from_rows
from assay.spec.base import Spec
from assay.spec.load import read_mapping, shelf, validate

FACTORS = (0.25, 0.5, 2.0, 4.0)
"""Sizes that are compared with the best one."""


class LawSpec(Spec):
    """A published law: the constants of `law.Law`, with where they are from."""

    source: str = Field(min_length=1)
    e: float = Field(gt=0)
    a: float = Field(gt=0)
    b: float = Field(gt=0)
    alpha: float = Field(gt=0)
    beta: float = Field(gt=0)

    @property
    def law(self) -> Law:
        return Law(self.e, self.a, self.b, self.alpha, self.beta)


def shipped() -> dict[str, LawSpec]:
    """Published laws by name."""
    return {name: validate(LawSpec, read_mapping(path), name) for name, path in shelf("laws").items()}


@dataclass(frozen=True)
class Known:
    """What a plan stands on: a law, with the laws of its resamples (none for a published one), FLOPs for each
    parameter and token, and the largest budget that the law has seen (null: not said)."""

    law: Law
    draws: tuple[Law, ...] = ()
    per_token: float = PER_TOKEN
    seen: float | None = None
    level: float = 0.9


def known(rows: Sequence[Mapping[str, Any]], options: Options | None = None, where: str = "points") -> Known:
    """From runs. FLOPs for each parameter and token are those of these runs (their geometric mean): a small model's
    attention and head cost it more than 6."""
    options = options or Options()
    points = from_rows(rows, options.count, where)
    found: Fitted = fitted(points, options)
    return Known(found.law, found.draws, per_token(points), float(points.flops.max()), options.level)


def per_token(points: Points) -> float:
    return math.exp(float(np.log(points.flops / (points.params * points.tokens)).mean()))


def plan(budget: float, given: Known) -> dict[str, Any]:
    """Size, tokens and loss at this budget; `wrong`: what other sizes would cost; `regret`: what this plan costs where
    one of the resampled laws is the true one, in nats and as the share of the budget that is lost."""
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget: {budget}; accepted: FLOPs above 0")
    law, k = given.law, given.per_token
    size = law.best_params(budget, k)
    sizes = [one.best_params(budget, k) for one in given.draws]
    losses = [one.best_loss(budget, k) for one in given.draws]
    tokens = [budget / (k * n) for n in sizes]
    return {
        "budget_flops": budget,
        "beyond": budget / given.seen if given.seen else None,
        "params": {"value": size, "interval": interval(sizes, given.level)},
        "tokens": {"value": budget / (k * size), "interval": interval(tokens, given.level)},
        "tokens_per_param": budget / (k * size) / size,
        "loss_nats": {"value": law.best_loss(budget, k), "interval": interval(losses, given.level)},
        "flops_per_param_token": k,
        "wrong": [cost(law, factor * size, budget, k) | {"factor": factor} for factor in FACTORS],
        "regret": regret(given, size, budget),
    }


def cost(law: Law, size: float, budget: float, per_token: float = PER_TOKEN) -> dict[str, float]:
    """A budget spent on this size rather than on the best: nats above the best loss, and the share of the budget that
    would have bought the same loss at the best size less."""
    loss = law.loss_at(size, budget, per_token)
    best = law.best_loss(budget, per_token)
    return {
        "params": size,
        "loss_nats": loss,
        "excess_nats": loss - best,
        "wasted": 1.0 - flops_for(law, loss, budget, per_token) / budget,
    }


def flops_for(law: Law, loss: float, most: float, per_token: float = PER_TOKEN) -> float:
    """The least FLOPs, at most `most`, that buy this loss at the best size."""

    def above(log_flops: float) -> float:
        return law.best_loss(math.exp(log_flops), per_token) - loss

    high = math.log(most)
    if above(high) >= 0:
        return most
    low = high - 1.0
    while above(low) < 0:
        low -= 1.0
    return math.exp(brentq(above, low, high))


def regret(given: Known, size: float, budget: float) -> dict[str, Any] | None:
    """Over the resampled laws; None without them."""
    costs = [cost(law, size, budget, given.per_token) for law in given.draws]
    if len(costs) < 20:
        return None
    ends = {
        name: [float(np.quantile([c[name] for c in costs], q)) for q in (0.5, 0.95)]
        for name in ("excess_nats", "wasted")
    }
    return {f"{name}_{point}": v for name, pair in ends.items() for point, v in zip(("p50", "p95"), pair)}


def rate_law(sizes: Sequence[float], rates: Sequence[float]) -> tuple[float, float]:
    """rate = scale * size^exponent, least squares in logarithms. ValueError for fewer than two sizes."""
    if len(set(sizes)) < 2:
        raise ValueError(f"learning rates of {len(set(sizes))} sizes; a power law needs 2 or more")
    slope, offset = np.polyfit(np.log(sizes), np.log(rates), 1)
    return math.exp(offset), float(slope)
