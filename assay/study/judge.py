"""Verdicts on arms and outcomes of claims, as Results. A claim has three values: noise is neither yes nor no."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from assay.spec.result import Result
from assay.study.claims import (
    COMPARE,
    Compare,
    Correlation,
    Equivalent,
    Every,
    Expr,
    Number,
    Term,
    Test,
    VerdictIs,
    arms,
    parse,
)
from assay.study.evidence import Evidence, lower_is_better
from assay.study.statistics import (
    ALPHA,
    Comparison,
    Difference,
    Metric,
    Samples,
    compare,
    difference,
    noise_floor,
    one_sample,
    rank_correlation,
)

Outcome = Literal["confirmed", "contradicted", "not distinguishable", "not tested"]
# A conjunction is as strong as its weakest part.
WEAKEST: tuple[Outcome, ...] = ("contradicted", "not tested", "not distinguishable", "confirmed")
WORDS: Mapping[str, str] = {
    "better": "is better than",
    "worse": "is worse than",
    "not distinguishable": "is not distinguishable from",
    "not tested": "is not tested against",
}


@dataclass(frozen=True)
class Court:
    """What a study is judged by: its base arm, its arms in order, its metric and its error rate."""

    base_arm: str
    arms: tuple[str, ...]
    metric: Metric = field(default_factory=Metric)
    alpha: float = ALPHA


def verdicts(evidence: Evidence, court: Court) -> dict[str, Comparison]:
    """Every arm that ran, against the base arm, Holm-corrected."""
    return _compared(evidence, court, court.metric, court.base_arm, {})


def _compared(
    evidence: Evidence, court: Court, metric: Metric, base: str, filters: Mapping[str, str | int | float | bool]
) -> dict[str, Comparison]:
    samples = {arm: evidence.samples(metric.name, arm, filters) for arm in court.arms if arm != base}
    return compare(evidence.samples(metric.name, base, filters), samples, metric, court.alpha)


def verdict_results(evidence: Evidence, court: Court, about: Result) -> list[Result]:
    """One `verdict` line an arm; `about` lends version, commit, device and recipe digest."""
    noise = noise_floor(evidence.samples(court.metric.name, court.base_arm), court.alpha)
    out = []
    for arm, found in verdicts(evidence, court).items():
        values = {
            "metric": court.metric.name,
            "base_arm": court.base_arm,
            "noise": noise.std if noise else None,
            "detectable": noise.detectable if noise else None,
            **asdict(found),
        }
        out.append(about.model_copy(update={"kind": "verdict", "arm": arm, "seed": None, "values": values}))
    return out


def claim_results(evidence: Evidence, court: Court, claims: Iterable[Mapping[str, str]], about: Result) -> list[Result]:
    """One `claim` line for each claim `{id, text, source, test}`."""
    out = []
    for claim in claims:
        outcome, sentence = judge(parse(claim["test"]), evidence, court)
        values = {**claim, "outcome": outcome, "evidence": sentence}
        out.append(about.model_copy(update={"kind": "claim", "arm": None, "seed": None, "values": values}))
    return out


def judge(test: Test, evidence: Evidence, court: Court) -> tuple[Outcome, str]:
    """The outcome of one test and a sentence with its numbers."""
    if isinstance(test, Every):
        parts = [judge(inner, evidence, court) for inner in test.tests]
        return min((o for o, _ in parts), key=WEAKEST.index), " ".join(dict.fromkeys(s for _, s in parts))
    if isinstance(test, VerdictIs):
        return _judge_verdict(test, evidence, court)
    if isinstance(test, Correlation):
        return _judge_correlation(test, evidence, court)
    left, right = _values(test.left, evidence), _values(test.right, evidence)
    if left is None or right is None:
        missing = ", ".join(sorted(arm for arm in arms(test) if arm not in evidence.arms())) or "these rows"
        return "not tested", f"No result for {missing}."
    if isinstance(left, float) and isinstance(right, float):
        return _judge_exact(test, left, right)
    gap, count = _gap(test, left, right)
    if gap is None:
        return _judge_diverged(test, left, right)
    return _judge_gap(test, gap, count, court.alpha, f"{_side(left)} against {_side(right)}")


def _judge_verdict(test: VerdictIs, evidence: Evidence, court: Court) -> tuple[Outcome, str]:
    metric = Metric(test.metric, lower_is_better(test.metric))
    if test.metric == court.metric.name:
        metric = court.metric
    base = test.base or court.base_arm
    family = replace(court, arms=tuple(dict.fromkeys((*court.arms, court.base_arm, test.arm))))
    found = _compared(evidence, family, metric, base, dict(test.filters))[test.arm]
    sentence = f"{test.arm} {WORDS[found.verdict]} {base} in {test.metric}"
    if found.delta is not None and found.low is not None and found.high is not None:
        numbers = _interval(found.delta, found.low, found.high)
        sentence += f": {numbers}, {_seeds(found.seeds)} against {found.base_seeds}"
    sentence += f"; {found.note}." if found.note else "."
    if found.verdict in ("not tested", "not distinguishable"):
        return found.verdict, sentence
    return ("confirmed" if found.verdict == test.expected else "contradicted"), sentence


def _judge_correlation(test: Correlation, evidence: Evidence, court: Court) -> tuple[Outcome, str]:
    """By the interval of Spearman's rho; an arm without both metrics, or with one that is not finite, is left out."""
    pairs = []
    for arm in dict.fromkeys((court.base_arm, *court.arms)):
        found = [
            evidence.samples(name, arm, dict(test.filters) if "." in name else {}).values() for name in test.metrics
        ]
        means = [math.fsum(values) / len(values) for values in found if values]
        if len(means) == 2 and all(map(math.isfinite, means)):
            pairs.append((means[0], means[1]))
    found_rho = rank_correlation(pairs, court.alpha)
    if found_rho is None:
        return "not tested", f"{len(pairs)} arms have both; a correlation needs 5 with values that differ."
    rho, low, high = found_rho
    sentence = f"rank correlation {rho:+.2f} ({low:+.2f} to {high:+.2f}) over {len(pairs)} arms."
    if (high < test.bound) if test.op == "<" else (low > test.bound):
        return "confirmed", sentence
    if (low > test.bound) if test.op == "<" else (high < test.bound):
        return "contradicted", sentence
    return "not distinguishable", sentence


def _values(expr: Expr, evidence: Evidence) -> float | dict[int, float] | None:
    """A number where nothing depends on the seed, else seed -> number; None where a row is missing."""
    if isinstance(expr, Number):
        return expr.value
    if isinstance(expr, Term):
        found = evidence.samples(expr.metric, expr.arm, dict(expr.filters))
        if expr.kind == "mean":
            return found or None
        first = next(iter(found.values()), math.nan)
        return first if found and all(math.isclose(first, v, rel_tol=1e-9) for v in found.values()) else None
    left, right = _values(expr.left, evidence), _values(expr.right, evidence)
    if left is None or right is None:
        return None
    if isinstance(left, float) and isinstance(right, float):
        return _apply(expr.op, left, right)
    if isinstance(left, float):
        left = dict.fromkeys(right, left) if isinstance(right, dict) else {}
    if isinstance(right, float):
        right = dict.fromkeys(left, right)
    return {seed: _apply(expr.op, left[seed], right[seed]) for seed in left if seed in right} or None


def _apply(op: str, a: float, b: float) -> float:
    if op == "/":
        return a / b if b else math.nan
    return a + b if op == "+" else a - b if op == "-" else a * b


def _gap(test: Compare | Equivalent, left: float | Samples, right: float | Samples) -> tuple[Difference | None, int]:
    """Left minus right by the same test as a verdict's where each side is one arm of its own, else seed by seed."""
    if isinstance(left, float):
        assert not isinstance(right, float)
        left = dict.fromkeys(right, left)
        gaps = {s: left[s] - right[s] for s in right}
    elif isinstance(right, float):
        gaps = {s: v - right for s, v in left.items()}
    else:
        finite = all(map(math.isfinite, (*left.values(), *right.values())))
        one_each = len(arms(test.left)) == len(arms(test.right)) == 1 and arms(test.left) != arms(test.right)
        if one_each and finite and min(len(left), len(right)) >= 2:
            return difference(left, right), min(len(left), len(right))
        gaps = {s: left[s] - right[s] for s in left if s in right}
    if not all(map(math.isfinite, gaps.values())):
        return None, len(gaps)
    return one_sample(list(gaps.values())), len(gaps)


def _judge_gap(
    test: Compare | Equivalent, gap: Difference, count: int, alpha: float, sides: str
) -> tuple[Outcome, str]:
    confidence = 1 - 2 * alpha if isinstance(test, Equivalent) else 1 - alpha
    low, high = gap.interval(confidence)
    sentence = f"{sides}: {_interval(gap.delta, low, high)} ({confidence:.0%} interval, {_seeds(count)})."
    outcome: Outcome = "not distinguishable"
    if isinstance(test, Equivalent):
        if gap.within(test.within, alpha):
            outcome = "confirmed"
        elif low > test.within or high < -test.within:
            outcome = "contradicted"
        return outcome, sentence
    if test.op in (">", ">="):
        low, high = -high, -low
    if high < 0 or (high == 0 and test.op in ("<=", ">=")):
        outcome = "confirmed"
    elif low > 0:
        outcome = "contradicted"
    return outcome, sentence


def _judge_exact(test: Compare | Equivalent, left: float, right: float) -> tuple[Outcome, str]:
    if isinstance(test, Equivalent):
        holds = abs(left - right) < test.within
    elif math.isclose(left, right, rel_tol=1e-9):
        holds = test.op in ("<=", ">=", "==")
    else:
        holds = COMPARE[test.op](left, right)
    return ("confirmed" if holds else "contradicted"), f"{left:.6g} against {right:.6g}, the same in every seed."


def _judge_diverged(test: Compare | Equivalent, left: float | Samples, right: float | Samples) -> tuple[Outcome, str]:
    """No mean exists. Nothing is concluded: in which direction a diverged value would count depends on the metric."""
    lost = [sum(not math.isfinite(v) for v in side.values()) for side in (left, right) if not isinstance(side, float)]
    if sum(lost):
        return "not tested", f"{sum(lost)} of the values are not finite: their runs diverged."
    return "not tested", "A test needs 2 seeds or more."


def _side(values: float | Samples) -> str:
    if isinstance(values, float):
        return f"{values:.4g}"
    return f"{math.fsum(values.values()) / len(values):.4g}"


def _interval(delta: float, low: float, high: float) -> str:
    return f"difference {delta:+.4g} ({low:+.4g} to {high:+.4g})"


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"
