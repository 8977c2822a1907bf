"""The parametric law of loss in parameters and tokens (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import minimize

from assay.laws.points import Array, Points

PER_TOKEN = 6.0
"""FLOPs of training for each parameter and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
LEAST = 5
"""Runs that five constants need."""
FIRST, KEPT, STEPS = 40, 3, 300
"""Every start takes so many steps, the best of them go on to the end. A descent that needs more than STEPS runs along a
valley towards constants without end."""
GRID = (np.arange(0.1, 1.3, 0.2), np.arange(0.05, 1.0, 0.15))
"""Starts: exponents, and shares of the smallest loss that no model or data removes."""


@dataclass(frozen=True)
class Law:
    """L(N, D) = e + a / N^alpha + b / D^beta: nats per token of N parameters trained on D tokens (equation 10)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, params: Array | float, tokens: Array | float) -> Array:
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.e + self.a * n**-self.alpha + self.b * d**-self.beta)

    @property
    def exponent(self) -> float:
        """Of the best size in FLOPs: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def best_params(self, flops: float, per_token: float = PER_TOKEN) -> float:
        """The size with the lowest loss where flops = per_token N D: G (C / 6)^(beta / (alpha + beta)), with
        G = (alpha a / (beta b))^(1 / (alpha + beta)) (equation 4)."""
        both = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1.0 / both)
        return float(g * (flops / per_token) ** (self.beta / both))

    def best_loss(self, flops: float, per_token: float = PER_TOKEN) -> float:
        return self.loss_at(self.best_params(flops, per_token), flops, per_token)

    def loss_at(self, params: float, flops: float, per_token: float = PER_TOKEN) -> float:
        """Of this size when all FLOPs are spent on it."""
        return float(self.loss(params, flops / (per_token * params)))

    def as_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Objective:
    """What is minimised: Huber's loss (delta) of the difference of log losses, summed over runs.

    mean: their mean in its place, which has the same minimum and gradients smaller by the number of runs; then a
    tolerance that stops at small gradients stops early. That happened to the fit published with the Chinchilla models
    (Besiroglu et al. 2024, arXiv 2404.10102, section 3). gtol: the largest gradient at which BFGS stops.
    """

    delta: float = 1e-3
    mean: bool = False
    gtol: float = 1e-8
    starts: int = 16


class _Problem:
    """Constants as theta = (log e, log a', log b', alpha, beta), where a' and b' belong to N and D in units of their
    geometric means: so the exponents and the scales can be told apart by the minimiser."""

    def __init__(self, points: Points, objective: Objective) -> None:
        self.n, self.d = np.log(points.params), np.log(points.tokens)
        self.at = self.n.mean(), self.d.mean()
        self.n, self.d = self.n - self.at[0], self.d - self.at[1]
        self.y, self.objective = np.log(points.loss), objective
        self.scale = 1.0 / len(self.y) if objective.mean else 1.0

    def value(self, theta: Array) -> tuple[float, Array]:
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(self.n, e), a - alpha * self.n, b - beta * self.d])
        top = terms.max(0)
        weights = np.exp(terms - top)
        total = weights.sum(0)
        miss = top + np.log(total) - self.y
        weights /= total
        delta, size = self.objective.delta, np.abs(miss)
        huber = np.where(size <= delta, 0.5 * miss**2, delta * (size - 0.5 * delta))
        slope = np.clip(miss, -delta, delta)
        by_n, by_d = slope * weights[1], slope * weights[2]
        constant, least = (slope * weights[0]).sum(), (by_n.sum(), by_d.sum())
        gradient = np.array([constant, *least, -(by_n * self.n).sum(), -(by_d * self.d).sum()])
        return self.scale * float(huber.sum()), self.scale * gradient

    def starts(self) -> list[Array]:
        """The best of a grid; for each, the rest of the loss is parted evenly between size and data."""
        floor = math.exp(self.y.min())
        grid = []
        for share in GRID[1]:
            rest = math.log(max(math.exp(self.y.mean()) - share * floor, 1e-3) / 2.0)
            grid += [
                np.array([math.log(share * floor), rest, rest, alpha, beta]) for alpha in GRID[0] for beta in GRID[0]
            ]
        return sorted(grid, key=lambda theta: self.value(theta)[0])[: self.objective.starts]

    def descend(self, theta: Array, steps: int = STEPS) -> tuple[float, Array]:
        options = {"gtol": self.objective.gtol, "maxiter": steps}
        found = minimize(self.value, theta, jac=True, method="BFGS", options=options)
        return float(found.fun), np.asarray(found.x)

    def law(self, theta: Array) -> Law:
        e, a, b, alpha, beta = (float(x) for x in theta)
        scales = math.exp(a + alpha * self.at[0]), math.exp(b + beta * self.at[1])
        return Law(math.exp(e), *scales, alpha, beta)

    def theta(self, law: Law) -> Array:
        logs = math.log(law.a) - law.alpha * self.at[0], math.log(law.b) - law.beta * self.at[1]
        return np.array([math.log(law.e), *logs, law.alpha, law.beta])


def fit(points: Points, objective: Objective | None = None, start: Law | None = None) -> Law:
    """The law with the smallest objective, by BFGS from many starts, or from `start` alone.

    ValueError for fewer runs than constants, or where sizes or tokens do not vary, or no start ends at a law.
    """
    if len(points) < LEAST:
        raise ValueError(f"{len(points)} runs; a law has 5 constants: at least {LEAST} are accepted")
    for name in ("params", "tokens"):
        if len(np.unique(getattr(points, name))) < 2:
            raise ValueError(f"{name}: the same in all runs, so nothing is known of how they matter")
    problem = _Problem(points, objective or Objective())
    with np.errstate(all="ignore"):
        begun = [problem.theta(start)] if start is not None else _best(problem)
        ends = [problem.descend(theta) for theta in begun]
    laws = [(value, problem.law(theta)) for value, theta in ends if _is_law(theta)]
    if not laws:
        raise ValueError("no law was found: loss does not fall with size and with tokens in these runs")
    return min(laws, key=lambda one: one[0])[1]


def _best(problem: _Problem) -> list[Array]:
    first = [problem.descend(theta, FIRST) for theta in problem.starts()]
    return [theta for _, theta in sorted(first, key=lambda one: one[0]) if np.all(np.isfinite(theta))][:KEPT]


def _is_law(theta: Array) -> bool:
    """Loss falls in both, and the constants are numbers that a float holds."""
    return bool(np.all(np.isfinite(theta)) and theta[3] > 1e-3 and theta[4] > 1e-3 and np.abs(theta).max() < 100.0)


def misses(law: Law, points: Points) -> Array:
    """log of predicted over found, one for each run."""
    return np.log(law.loss(points.params, points.tokens)) - np.log(points.loss)


def bootstrap(points: Points, law: Law, draws: int, seed: int = 0, objective: Objective | None = None) -> list[Law]:
    """Laws of so many resamples of the runs (Efron 1979), each begun at the law of all. Resamples without one are left
    out: where many are, the runs do not determine a law."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = generator.integers(0, len(points), len(points))
        try:
            found.append(fit(points.take(chosen), objective, law))
        except ValueError:
            continue
    return found


def interval(values: list[float], level: float = 0.9) -> tuple[float, float] | None:
    """The middle share of the draws; None for fewer than twenty."""
    if len(values) < 20:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
