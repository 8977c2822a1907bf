"""Is a difference between two arms real, or seed noise? Values are one number a seed, in the metric's own unit.

Five or more seeds in common: the paired t interval, since paired seeds share data order and initial draws. Fewer:
Student's t with the spread pooled over all seeds of the arm and the base arm, which keeps its level when both spread
alike. Pairing three seeds leaves two degrees of freedom, which Holm's correction over seven arms answers with an
interval of twelve standard errors; what pairing takes from the spread does not pay for that. One seed: an interval
from the base arm's spread, and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

Samples = Mapping[int, float]
Verdict = Literal["better", "worse", "not distinguishable", "not tested"]
Method = Literal["paired", "pooled", "base spread", "one sample"]
MIN_SEEDS = 2
MIN_PAIRS = 5
ALPHA = 0.05


@dataclass(frozen=True)
class Metric:
    """What is compared. `interest`: the smallest difference that matters, in the metric's unit; 0 asks for any."""

    name: str = "loss_nats"
    lower_is_better: bool = True
    interest: float = 0.0


@dataclass(frozen=True)
class Difference:
    """A mean difference, its standard error and degrees of freedom; `p` is two-sided against zero."""

    delta: float
    se: float
    df: float
    method: Method

    @property
    def p(self) -> float:
        if self.se == 0.0:
            return 1.0 if self.delta == 0.0 else 0.0
        return float(2.0 * stats.t.sf(abs(self.delta) / self.se, self.df))

    def interval(self, confidence: float = 1.0 - ALPHA) -> tuple[float, float]:
        half = float(stats.t.ppf(0.5 + confidence / 2.0, self.df)) * self.se
        return self.delta - half, self.delta + half

    def within(self, bound: float, alpha: float = ALPHA) -> bool:
        """Two one-sided tests (Schuirmann 1987): the difference is inside (-bound, bound) at level `alpha`."""
        low, high = self.interval(1.0 - 2.0 * alpha)
        return -bound < low and high < bound


@dataclass(frozen=True)
class Noise:
    """The base arm's spread over seeds and the effect that two arms of so many seeds detect with power 0.8."""

    std: float
    detectable: float
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """One arm against the base arm. `delta` is arm minus base; `low` and `high` are at `confidence`, Holm's own level
    for this arm, so the interval excludes zero exactly when Holm rejects. None: no such number exists."""

    verdict: Verdict
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    confidence: float | None = None
    seeds: int = 0
    base_seeds: int = 0
    method: Method | None = None
    note: str = ""


def one_sample(values: Sequence[float]) -> Difference | None:
    """The mean of finite values against zero, by Student's t; None with fewer than two."""
    if len(values) < MIN_SEEDS:
        return None
    x = np.asarray(values, dtype=np.float64)
    return Difference(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x) - 1, "one sample")


def difference(arm: Samples, base: Samples) -> Difference | None:
    """Arm minus base from finite values by seed; None where nothing measures the spread (one seed a side)."""
    pairs = sorted(arm.keys() & base.keys())
    if len(pairs) >= MIN_PAIRS:
        gaps = np.array([arm[seed] - base[seed] for seed in pairs])
        scale = max(abs(base[seed]) for seed in pairs)
        # Equal up to rounding is equal: a spread of 1e-17 would make the smallest gap significant.
        spread = float(gaps.std(ddof=1)) if float(np.ptp(gaps)) > 1e-12 * scale else 0.0
        delta = float(gaps.mean()) if float(np.abs(gaps).max()) > 1e-12 * scale else 0.0
        return Difference(delta, spread / math.sqrt(len(pairs)), len(pairs) - 1, "paired")
    if not arm or len(base) < MIN_SEEDS:
        return None
    a, b = np.array(list(arm.values())), np.array(list(base.values()))
    squares = float(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum())
    df = len(a) + len(b) - 2
    delta = float(a.mean() - b.mean())
    scale = float(np.abs(np.concatenate([a, b])).max())
    # Equal up to rounding is equal, as above.
    squares = squares if squares > (1e-12 * scale) ** 2 else 0.0
    delta = delta if abs(delta) > 1e-12 * scale else 0.0
    se = math.sqrt(squares / df * (1 / len(a) + 1 / len(b)))
    return Difference(delta, se, df, "pooled" if len(a) >= MIN_SEEDS else "base spread")


def rank_correlation(pairs: Sequence[tuple[float, float]], alpha: float = ALPHA) -> tuple[float, float, float] | None:
    """Spearman's rho and its interval: Fisher's z with the standard error of Bonett and Wright (2000, Psychometrika 65,
    section 3), sqrt((1 + rho^2 / 2) / (n - 3)). None for fewer than 5 pairs, or where one side is constant."""
    if len(pairs) < MIN_PAIRS or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return None
    rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    if abs(rho) > 1 - 1e-12:  # its z is infinite; the largest rho below 1 that so many ranks can have
        rho = math.copysign(1 - 6 / (len(pairs) * (len(pairs) ** 2 - 1)), rho)
    reach = stats.norm.ppf(1 - alpha / 2) * math.sqrt((1 + rho * rho / 2) / (len(pairs) - 3))
    return rho, math.tanh(math.atanh(rho) - reach), math.tanh(math.atanh(rho) + reach)


def power(effect: float, se: float, df: float, alpha: float = ALPHA) -> float:
    """Power of the two-sided t test for a true `effect`, from the noncentral t distribution."""
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    shift = abs(effect) / se
    # scipy's noncentral t is NaN in its far lower tail, where the probability is below 1e-6.
    wrong_side = float(stats.nct.cdf(-critical, df, shift)) if shift < 4.0 else 0.0
    return float(stats.nct.sf(critical, df, shift)) + wrong_side


def detectable(se: float, df: float, alpha: float = ALPHA, wanted: float = 0.8) -> float:
    """The smallest true effect that the two-sided t test finds with power `wanted`."""
    if se == 0.0:
        return 0.0
    top = 2.0 * (float(stats.t.ppf(1 - alpha / 2, df)) + 4.0)
    while power(top, 1.0, df, alpha) < wanted:
        top *= 2.0
    return se * float(optimize.brentq(lambda x: power(x, 1.0, df, alpha) - wanted, 0.0, top))


def noise_floor(base: Samples, alpha: float = ALPHA) -> Noise | None:
    """From the base arm's finite seeds; None with fewer than two."""
    values = list(_finite(base).values())
    n = len(values)
    if n < MIN_SEEDS:
        return None
    std = float(np.std(values, ddof=1))
    return Noise(std, detectable(std * math.sqrt(2 / n), 2 * n - 2, alpha), n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given."""
    adjusted = [0.0] * len(p)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def holm_levels(p: Sequence[float], alpha: float = ALPHA) -> list[float]:
    """The level of each test's own interval: alpha / (m - rank), and where Holm stops, that rank's level for the rest.

    At these levels an interval excludes zero exactly when Holm rejects. Each covers at its own level; together they
    are simultaneous only where all levels are the first, alpha / m.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    levels, level, stopped = [0.0] * len(p), alpha, False
    for rank, i in enumerate(order):
        if not stopped:
            level = alpha / (len(p) - rank)
            stopped = p[i] > level
        levels[i] = level
    return levels


def compare(
    base: Samples, arms: Mapping[str, Samples], metric: Metric | None = None, alpha: float = ALPHA
) -> dict[str, Comparison]:
    """Every arm against the base arm, Holm-corrected over the arms that can be tested.

    The chance of one or more false `better` or `worse` among arms that equal the base is at most `alpha`.
    A value that is not finite is a diverged run: it counts against its arm and never enters a mean.
    """
    metric = metric or Metric()
    finite_base = _finite(base)
    gaps = {name: difference(_finite(arm), finite_base) for name, arm in arms.items()}
    tested = [n for n, gap in gaps.items() if gap is not None and gap.method != "base spread"]
    raw = [gap.p for n in tested if (gap := gaps[n]) is not None]
    adjusted, levels = dict(zip(tested, holm(raw))), dict(zip(tested, holm_levels(raw, alpha)))
    out = {}
    for name, arm in arms.items():
        level = levels.get(name, alpha)
        found = _compared(gaps[name], metric, level, adjusted.get(name), (len(arm), len(base)))
        out[name] = _with_divergence(found, arm, base, metric)
    return out


def _compared(
    gap: Difference | None, metric: Metric, level: float, p_holm: float | None, seeds: tuple[int, int]
) -> Comparison:
    if gap is None:
        note = f"a verdict needs {MIN_SEEDS} seeds a side"
        return Comparison("not tested", seeds=seeds[0], base_seeds=seeds[1], note=note)
    low, high = gap.interval(1 - level)
    verdict: Verdict = "not tested"
    note = f"a verdict needs {MIN_SEEDS} seeds a side; the interval is the base arm's spread"
    if p_holm is not None:
        verdict, note = _verdict(gap, metric, level)
    p = gap.p if p_holm is not None else None
    return Comparison(verdict, gap.delta, low, high, p, p_holm, 1 - level, *seeds, gap.method, note)


def _verdict(gap: Difference, metric: Metric, level: float) -> tuple[Verdict, str]:
    if metric.interest > 0 and gap.within(metric.interest, level):
        return "not distinguishable", f"equivalent: the difference is within {metric.interest:g}"
    if gap.p > level:
        return "not distinguishable", ""
    return ("better" if (gap.delta < 0) == metric.lower_is_better else "worse"), ""


def _with_divergence(found: Comparison, arm: Samples, base: Samples, metric: Metric) -> Comparison:
    """Diverged runs decide where they leave no doubt, and otherwise only ever count against their own arm."""
    arm_lost, base_lost = len(arm) - len(_finite(arm)), len(base) - len(_finite(base))
    if not arm_lost and not base_lost:
        return found
    sides = [("arm", arm_lost, len(arm)), ("base arm", base_lost, len(base))]
    said = "; ".join(f"{side} diverged in {lost} of {total} seeds" for side, lost, total in sides if lost)
    arm_dead, base_dead = arm_lost == len(arm), base_lost == len(base)
    verdict = found.verdict
    if min(len(arm), len(base)) < MIN_SEEDS:
        verdict = "not tested"
    elif arm_dead and base_dead:
        verdict = "not distinguishable"
    elif arm_dead and not base_lost:
        verdict = "worse"
    elif base_dead and not arm_lost:
        verdict = "better"
    elif (verdict == "better" and arm_lost) or (verdict == "worse" and base_lost):
        verdict = "not distinguishable"
    delta = found.delta
    if arm_dead != base_dead:
        delta = math.inf if arm_dead == metric.lower_is_better else -math.inf
    numbers = (delta, found.low, found.high, found.p, found.p_holm, found.confidence)
    return Comparison(verdict, *numbers, len(arm), len(base), found.method, said)


def _finite(samples: Samples) -> dict[int, float]:
    return {seed: value for seed, value in samples.items() if math.isfinite(value)}
