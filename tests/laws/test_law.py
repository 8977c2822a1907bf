"""The parametric law: closed forms against numeric ones, and constants that a fit gives back."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize_scalar

from assay.laws.law import Law, Objective, _Problem, bootstrap, fit, interval, misses
from assay.laws.points import Points
from tests.laws.synthetic import TRUE, runs


@pytest.mark.parametrize("law", [TRUE, Law(1.69, 406.4, 410.7, 0.34, 0.28), Law(2.0, 30.0, 90.0, 0.5, 0.2)])
@pytest.mark.parametrize("flops", [1e12, 5.76e23])
def test_the_best_size_is_where_a_search_finds_the_lowest_loss(law: Law, flops: float) -> None:
    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        return float(law.e + law.a * n**-law.alpha + law.b * (flops / (6 * n)) ** -law.beta)

    found = minimize_scalar(loss, bounds=(5.0, 40.0), method="bounded", options={"xatol": 1e-10})
    assert np.log(law.best_params(flops)) == pytest.approx(found.x, abs=1e-4)
    assert law.best_loss(flops) == pytest.approx(found.fun, rel=1e-12)
    assert law.exponent == pytest.approx(
        np.log(law.best_params(4 * flops) / law.best_params(flops)) / np.log(4.0), rel=1e-12
    )


def test_the_gradient_is_that_of_differences_and_the_mean_is_the_sum_by_the_runs() -> None:
    points = runs(budgets=3, sizes=3)
    for mean in (False, True):
        problem = _Problem(points, Objective(mean=mean))
        theta = problem.theta(dataclasses.replace(TRUE, e=1.7, alpha=0.4))
        numeric = approx_fprime(theta, lambda x: problem.value(x)[0], 1e-7)  # noqa: B023
        np.testing.assert_allclose(problem.value(theta)[1], numeric, rtol=1e-3, atol=1e-8)
    mean, total = (_Problem(points, Objective(mean=m)).value(theta)[0] for m in (True, False))
    assert mean * len(points) == pytest.approx(total)


def test_constants_written_in_other_units_are_the_same_law() -> None:
    points = runs(noise=0.0)
    problem = _Problem(points, Objective())
    back = problem.law(problem.theta(TRUE))
    assert dataclasses.astuple(back) == pytest.approx(dataclasses.astuple(TRUE), rel=1e-9)
    np.testing.assert_allclose(misses(back, points), 0.0, atol=1e-12)


def test_without_noise_the_constants_come_back() -> None:
    found = fit(runs(noise=0.0))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(TRUE), rel=2e-3)


def test_with_noise_the_known_constants_lie_in_the_bootstrap_intervals() -> None:
    points = runs(noise=0.01, seed=1)
    law = fit(points)
    draws = bootstrap(points, law, 60)
    assert len(draws) == 60
    for name in ("e", "a", "b", "alpha", "beta", "exponent"):
        low, high = interval([getattr(one, name) for one in draws], 0.99) or (0.0, 0.0)
        assert low < getattr(TRUE, name) < high and low < getattr(law, name) < high
    low, high = interval([one.exponent for one in draws]) or (0.0, 1.0)
    assert high - low < 0.1
    other = bootstrap(points, law, 60)
    assert [one.alpha for one in other] == [one.alpha for one in draws]


def test_one_wild_run_moves_hubers_fit_hardly_and_least_squares_much() -> None:
    points = runs(noise=0.002)
    wild = points.with_loss(np.where(np.arange(len(points)) == 3, 1.5, 1.0) * points.loss)
    huber, squares = fit(wild), fit(wild, Objective(delta=1e9))
    assert abs(huber.alpha - TRUE.alpha) < 0.02
    assert abs(squares.alpha - TRUE.alpha) > 3 * abs(huber.alpha - TRUE.alpha)


def test_a_mean_objective_with_a_loose_tolerance_stops_early() -> None:
    """Besiroglu et al. 2024, section 3: the same data, the same starts; only the scale of the gradient differs."""
    points, start = runs(noise=0.005), Law(1.5, 100.0, 100.0, 0.5, 0.5)
    early = fit(points, Objective(mean=True, gtol=1e-4), start)
    summed = fit(points, Objective(gtol=1e-4), start)
    tight = fit(points, Objective(mean=True, gtol=1e-9), start)
    assert abs(summed.alpha - TRUE.alpha) < 0.03 and abs(tight.alpha - summed.alpha) < 0.01
    assert abs(early.alpha - TRUE.alpha) > 0.1 and abs(early.e - TRUE.e) > 5 * abs(summed.e - TRUE.e)
    value = _Problem(points, Objective()).value
    theta = _Problem(points, Objective()).theta
    assert value(theta(early))[0] > 1.5 * value(theta(summed))[0]


def test_runs_that_say_nothing_are_refused() -> None:
    points = runs()
    with pytest.raises(ValueError, match="4 runs; a law has 5 constants"):
        fit(points.take(slice(4)))
    with pytest.raises(ValueError, match="params: the same in all runs"):
        fit(Points(np.full(9, 1e6), points.tokens[:9], points.flops[:9], points.loss[:9]))
    n, d = points.params, points.tokens
    with pytest.raises(ValueError, match="no law was found"):
        fit(Points(n, d, points.flops, 1.0 + 0.1 * np.log(n) + 0.1 * np.log(d)), Objective(starts=3))
