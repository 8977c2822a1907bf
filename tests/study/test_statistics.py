"""Against scipy's own tests, closed forms, and simulated studies with planted effects and planted nulls."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.study.statistics import (
    MIN_PAIRS,
    Comparison,
    Metric,
    compare,
    detectable,
    difference,
    holm,
    holm_levels,
    noise_floor,
    one_sample,
    power,
)

STUDIES = 400


def _samples(values: object, start: int = 0) -> dict[int, float]:
    return {start + i: float(v) for i, v in enumerate(np.asarray(values))}


@pytest.mark.parametrize("n", [5, 8, 12])
def test_paired_equals_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    arm, base = rng.normal(2.0, 0.1, n), rng.normal(2.05, 0.1, n)
    ours, theirs = difference(_samples(arm), _samples(base)), stats.ttest_rel(arm, base)
    assert ours is not None and ours.method == "paired"
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.interval(0.95) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)


@pytest.mark.parametrize("n", [2, 4])
def test_pooled_equals_scipy_where_seeds_are_few_or_not_shared(n: int) -> None:
    rng = np.random.default_rng(n)
    arm, base = rng.normal(2.0, 0.1, n), rng.normal(2.1, 0.1, 5)
    start = 3 if n == 2 else 100
    ours, theirs = difference(_samples(arm, start), _samples(base)), stats.ttest_ind(arm, base)
    assert ours is not None and ours.method == "pooled"
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert ours.interval(0.9) == pytest.approx(tuple(theirs.confidence_interval(0.9)), rel=1e-9)


def test_one_sample_equals_scipy() -> None:
    values = [0.3, -0.1, 0.25, 0.4]
    ours = one_sample(values)
    assert ours is not None and ours.p == pytest.approx(stats.ttest_1samp(values, 0.0).pvalue, rel=1e-9)
    assert one_sample([0.3]) is None


def test_a_single_seed_gets_the_base_arms_spread_and_no_verdict() -> None:
    base = {0: 2.0, 1: 2.02, 2: 1.98, 3: 2.0}
    found = compare(base, {"a": {0: 1.0}})["a"]
    half = stats.t.ppf(0.975, 3) * np.std(list(base.values()), ddof=1) * math.sqrt(1 + 1 / 4)
    assert found.verdict == "not tested" and found.p is None
    assert (found.low, found.high) == pytest.approx((-1.0 - half, -1.0 + half))


def test_holm_by_hand() -> None:
    # Holm 1979 by hand: sorted 0.005*4, 0.01*3, 0.03*2, 0.04 -> running maximum.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8))
def test_holm_levels_agree_with_the_adjusted_p(p: list[float]) -> None:
    for raw, adjusted, level in zip(p, holm(p), holm_levels(p, 0.05), strict=True):
        assert (raw <= level) == (adjusted <= 0.05) or math.isclose(adjusted, 0.05)


def _study(
    rng: np.random.Generator, effects: list[float], seeds: int, base_seeds: int, common: float = 0.02
) -> dict[str, Comparison]:
    """Losses with a seed effect that all arms share (of spread `common`) and noise of their own."""
    shared = rng.normal(0, common, base_seeds)
    base = _samples(2.0 + shared + rng.normal(0, 0.03, base_seeds))
    arms = {
        str(i): _samples(2.0 + effect + shared[:seeds] + rng.normal(0, 0.03, seeds)) for i, effect in enumerate(effects)
    }
    return compare(base, arms)


@pytest.mark.parametrize("seeds,base_seeds", [(5, 5), (3, 5), (2, 2), (2, 5)])
def test_family_wise_error_is_at_most_alpha(seeds: int, base_seeds: int) -> None:
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(STUDIES):
        found = _study(rng, [0.0] * 4, seeds, base_seeds)
        wrong += any(c.verdict in ("better", "worse") for c in found.values())
    assert wrong <= stats.binom.ppf(0.999, STUDIES, 0.05)


def test_planted_nulls_stay_within_alpha_beside_planted_effects() -> None:
    rng = np.random.default_rng(8)
    wrong = hits = 0
    for _ in range(STUDIES):
        found = _study(rng, [-0.4, 0.0, 0.0, 0.4], 5, 5)
        wrong += any(found[i].verdict in ("better", "worse") for i in "12")
        hits += found["0"].verdict == "better" and found["3"].verdict == "worse"
    assert wrong <= stats.binom.ppf(0.999, STUDIES, 0.05)
    assert hits >= 0.99 * STUDIES


@pytest.mark.parametrize("seeds,effect", [(3, 0.09), (5, 0.06), (8, 0.04)])
def test_power_is_that_of_the_t_test(seeds: int, effect: float) -> None:
    rng = np.random.default_rng(9)
    # What all arms share cancels in pairs, and only makes the pooled interval wider than it need be.
    paired = seeds >= MIN_PAIRS
    common, df = (0.02, seeds - 1) if paired else (0.0, 2 * seeds - 2)
    hits = sum(_study(rng, [-effect], seeds, seeds, common)["0"].verdict == "better" for _ in range(STUDIES))
    expected = power(effect, 0.03 * math.sqrt(2 / seeds), df)
    low, high = stats.binom.ppf([0.001, 0.999], STUDIES, expected)
    assert 0.2 < expected < 0.98 and low <= hits <= high


def test_power_of_no_effect_is_alpha_and_detectable_inverts_power() -> None:
    assert power(0.0, 1.0, 4) == pytest.approx(0.05)
    for df in (1, 2, 4, 30):
        assert power(detectable(0.3, df), 0.3, df) == pytest.approx(0.8, abs=1e-6)
    # Many seeds: the normal approximation 1.96 + 0.8416.
    assert detectable(1.0, 1e6) == pytest.approx(2.8016, abs=1e-3)


def test_noise_floor() -> None:
    noise = noise_floor({0: 1.0, 1: 1.2, 2: 1.4, 3: math.nan})
    assert noise is not None and noise.seeds == 3 and noise.std == pytest.approx(0.2)
    assert noise.detectable == pytest.approx(detectable(0.2 * math.sqrt(2 / 3), 4))
    assert noise_floor({0: 1.0}) is None


def _simple(shift: float) -> dict[int, float]:
    return {s: 2.0 + shift + 0.01 * ((s * 7) % 3) * (1 + shift) for s in range(5)}


@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=6), st.booleans())
def test_the_interval_excludes_zero_exactly_when_there_is_a_verdict(shifts: list[float], lower: bool) -> None:
    rng = np.random.default_rng(abs(hash(tuple(shifts))) % 2**32)
    arms = {str(i): _samples(2.0 + shift + rng.normal(0, 0.03, 4)) for i, shift in enumerate(shifts)}
    base = _samples(2.0 + rng.normal(0, 0.03, 4))
    for found in compare(base, arms, Metric("m", lower_is_better=lower)).values():
        assert found.low is not None and found.high is not None and found.delta is not None
        good = found.high < 0 if lower else found.low > 0
        bad = found.low > 0 if lower else found.high < 0
        assert found.verdict == ("better" if good else "worse" if bad else "not distinguishable")


def test_direction_and_smallest_effect_of_interest() -> None:
    base, arm = _simple(0.0), {"a": _simple(-0.005)}
    assert compare(base, arm)["a"].verdict == "better"
    assert compare(base, arm, Metric("accuracy", lower_is_better=False))["a"].verdict == "worse"
    small = compare(base, arm, Metric(interest=0.02))["a"]
    assert small.verdict == "not distinguishable" and "equivalent" in small.note
    assert compare(base, arm, Metric(interest=0.001))["a"].verdict == "better"


def test_equal_runs_are_equal() -> None:
    found = compare(_simple(0.0), {"same": _simple(0.0), "rounded": {s: v + 1e-15 for s, v in _simple(0.0).items()}})
    assert {c.verdict for c in found.values()} == {"not distinguishable"}
    assert found["rounded"].p == 1.0 and found["same"].low == 0.0


NAN = math.nan
CASES: list[tuple[Callable[[], tuple[dict[int, float], dict[int, float]]], str]] = [
    (lambda: ({0: NAN, 1: math.inf}, {0: 2.0, 1: 2.1}), "worse"),
    (lambda: ({0: 2.0, 1: 2.1}, {0: NAN, 1: NAN}), "better"),
    (lambda: ({0: NAN, 1: NAN}, {0: NAN, 1: NAN}), "not distinguishable"),
    (lambda: ({0: NAN}, {0: 2.0, 1: 2.1}), "not tested"),
    (lambda: ({0: 1.0, 1: 1.001, 2: 1.002, 3: NAN}, {s: 2 + s / 1e3 for s in range(4)}), "not distinguishable"),
    (lambda: ({0: 3.0, 1: 3.001, 2: 3.002, 3: NAN}, {s: 2 + s / 1e3 for s in range(4)}), "worse"),
    (lambda: ({s: 3 + s / 1e3 for s in range(4)}, {0: 2.0, 1: 2.001, 2: 2.002, 3: NAN}), "not distinguishable"),
]


@pytest.mark.parametrize("case,verdict", CASES)
def test_diverged_runs(case: Callable[[], tuple[dict[int, float], dict[int, float]]], verdict: str) -> None:
    arm, base = case()
    found = compare(base, {"a": arm})["a"]
    assert found.verdict == verdict and "diverged" in found.note


def test_divergence_is_signed_by_the_direction() -> None:
    base = {0: 0.5, 1: 0.6}
    assert compare(base, {"a": {0: NAN, 1: NAN}})["a"].delta == math.inf
    assert compare(base, {"a": {0: NAN, 1: NAN}}, Metric("accuracy", lower_is_better=False))["a"].delta == -math.inf
