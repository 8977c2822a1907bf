"""Approaches 1 and 2, the groups of runs, and a prediction of held-out runs."""

from dataclasses import replace

import numpy as np
import pytest

from assay.laws.fits import Options, analyse, held_out
from assay.laws.isoflop import envelope, parabola, power, redrawn, rung_bests
from assay.laws.law import Law, Objective
from assay.laws.points import Points, counts_of, from_rows
from tests.laws.synthetic import TRUE, runs


def test_rungs_are_runs_of_one_budget() -> None:
    points = runs(budgets=4)
    again = points.take(np.random.default_rng(0).permutation(len(points)))
    rungs = again.rungs
    assert len(rungs) == 4 and sorted(np.concatenate(rungs)) == list(range(len(points)))
    means = [again.flops[rung].mean() for rung in rungs]
    assert means == sorted(means) and all(np.ptp(again.flops[rung]) < 1.0 for rung in rungs)
    assert set(np.flatnonzero(again.largest)) == set(rungs[-1])


def test_runs_without_rungs_hold_out_the_tenth_with_most_flops() -> None:
    n = np.geomspace(1e6, 1e9, 40)
    points = Points(n, 20 * n, 120 * n * n, TRUE.loss(n, 20 * n))
    assert list(np.flatnonzero(points.largest)) == [36, 37, 38, 39]


def test_a_parabola_has_its_lowest_point_where_it_was_drawn() -> None:
    n = np.exp(np.array([12.0, 13.0, 14.0, 15.5]))
    loss = 2.5 + 0.03 * (np.log(n) - 13.7) ** 2
    found = parabola(Points(n, 1e15 / (6 * n), np.full(4, 1e15), loss))
    assert found is not None and found.inside
    assert np.log(found.params) == pytest.approx(13.7) and found.loss == pytest.approx(2.5)
    assert found.tokens == pytest.approx(1e15 / (6 * found.params))
    falling = parabola(Points(n, 1e15 / n, np.full(4, 1e15), 2.5 + 0.03 * (np.log(n) - 19.0) ** 2))
    assert falling is not None and not falling.inside
    assert parabola(Points(n, 1e15 / n, np.full(4, 1e15), 5.0 - loss)) is None
    assert parabola(Points(n[:2], 1e15 / n[:2], np.full(2, 1e15), loss[:2])) is None


def test_both_approaches_find_the_exponent_of_the_law() -> None:
    points = runs(noise=0.0, budgets=9, sizes=40)
    assert power(rung_bests(points)).exponent == pytest.approx(TRUE.exponent, abs=0.01)
    assert power(envelope(points)).exponent == pytest.approx(TRUE.exponent, abs=0.03)
    for one in (power(rung_bests(points)), power(envelope(points))):
        assert one.params[1] + one.tokens[1] == pytest.approx(1.0, abs=0.01)  # C = 6 N D
        assert one.best_params(1e20) == pytest.approx(TRUE.best_params(1e20), rel=0.1)
    draws = redrawn(runs(noise=0.003), rung_bests, 0.003, 60)
    low, high = np.quantile([one.exponent for one in draws], [0.005, 0.995])
    assert low < TRUE.exponent < high and high - low < 0.2


def test_the_largest_rung_is_foreseen_and_the_miss_is_the_difference() -> None:
    points = runs(noise=0.002)
    law, told = held_out(points, Options(draws=40))
    assert len(law.points) + len(told.points) == len(points)
    assert law.points.flops.max() < told.points.flops.min()
    np.testing.assert_allclose(told.misses, told.predicted - told.points.loss)
    assert np.abs(told.misses).max() < 0.03
    assert told.low is not None and told.high is not None
    truth = TRUE.loss(told.points.params, told.points.tokens)
    assert np.mean((told.low - 0.01 < truth) & (truth < told.high + 0.01)) > 0.8
    moved = points.with_loss(np.where(points.largest, points.loss + 0.5, points.loss))
    assert held_out(moved, Options(draws=0))[1].misses.mean() == pytest.approx(told.misses.mean() - 0.5, abs=1e-9)


QUICK = Options(draws=0, objective=Objective(starts=4))


def test_everything_at_once_counts_parameters_in_every_way_the_rows_allow() -> None:
    points = runs(noise=0.002, budgets=4, sizes=5)
    table = np.sqrt(points.params) * 400
    rows = [
        {
            "params_total": n + e,
            "params_active": n / 2 + e,
            "params_embedding": e,
            "tokens": d,
            "loss_nats": loss,
            "flops": c,
        }
        for n, e, d, loss, c in zip(points.params, table, points.tokens, points.loss, points.flops)
    ]
    plain = from_rows(rows, "without_embedding")
    np.testing.assert_allclose(plain.params, points.params)
    np.testing.assert_allclose(from_rows(rows, "active_without_embedding").params, points.params / 2)
    assert counts_of(rows) == ("total", "active", "without_embedding", "active_without_embedding")
    assert counts_of([{"N": 1e6, "D": 1e7, "L": 3.0}]) == ("total",)
    found = analyse(rows, replace(QUICK, count="without_embedding"))
    assert found["count"] == "without_embedding" and found["runs"] == len(points)
    ways = found["exponents"]
    assert ways["total"]["approach2"] < ways["without_embedding"]["approach2"]
    assert ways["without_embedding"]["approach3"] == found["approach3"]["constants"]["exponent"]["value"]
    assert found["approach2"]["exponent"]["value"] == pytest.approx(TRUE.exponent, abs=0.05)


def test_what_cannot_be_fitted_is_said_and_the_rest_stands() -> None:
    n = np.geomspace(1e6, 1e9, 12)
    d = n * np.array([5, 50] * 6)
    rows = [{"N": a, "D": b, "L": x} for a, b, x in zip(n, d, Law(1.7, 400, 400, 0.34, 0.28).loss(n, d))]
    found = analyse(rows, QUICK)
    assert found["approach1"] is None and found["approach2"] is None
    assert set(found["left_out"]) == {"approach1", "approach2"} and "2 or more" in found["left_out"]["approach2"]
    assert found["approach3"]["constants"]["alpha"]["interval"] is None
    assert found["approach3"]["constants"]["exponent"]["value"] == pytest.approx(0.28 / 0.62, rel=0.02)
