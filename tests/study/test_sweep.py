"""Measurements of some runs only, learning-rate sweeps, rates that are tuned by them, and the model that is kept."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.spec.result import Result
from assay.study.plan import Plan, Request, make_plan
from assay.study.run import Finished, run_study
from assay.study.sweep import Curve, best_rates, curves, note, sweep_results
from tests.study.test_plan import KV, POSITIONS, _study
from tests.study.test_run import POOL, TOUR, _find, _session
from tests.study.toy import MATERIALS
from tests.study.toy_trials import BEST, loss

RATES = [0.001, 0.004, 0.016]
# The optima of the toy arms: none 0.004, rope 0.004, alibi 0.016.
FOUND = {"none": 0.004, "rope": 0.004, "alibi": 0.016}


def _sweeping(**sweep: Any) -> Request:
    budgets = {"full": {"sweep": {"rates": RATES, **sweep}}}
    return Request("s", _study(POSITIONS, budgets=budgets, measurements=["latency"]), "full")


def _plan(**sweep: Any) -> Plan:
    return make_plan(_sweeping(**sweep), MATERIALS)


def test_only_the_first_seeds_and_the_listed_arms_are_measured() -> None:
    measured = [
        {"name": "latency", "only": {"seeds": 1}},
        {"name": "lens", "only": {"arms": ["rope"]}},
        {"name": "extrapolation", "ratios": [8], "only": {"seeds": 2, "arms": ["none", "rope"]}},
        "attention",
    ]
    plan = make_plan(Request("s", _study(POSITIONS, measurements=measured), "full"), MATERIALS)
    found = {(t.uses[0].arm, t.seed): [name for name, _ in t.measurements] for t in plan.trials}
    assert found["none", 0] == ["latency", "extrapolation", "attention"]
    assert found["rope", 0] == ["latency", "lens", "extrapolation", "attention"]
    assert found["rope", 1] == ["lens", "extrapolation", "attention"] and found["rope", 2] == ["lens", "attention"]
    assert found["alibi", 0] == ["latency", "attention"] and found["alibi", 2] == ["attention"]


def test_a_shared_run_is_asked_for_what_each_stage_wants_of_it() -> None:
    studies = {
        "positions": _study(POSITIONS, measurements=[{"name": "latency", "only": {"seeds": 1}}]),
        "kv": _study(KV, measurements=[{"name": "latency", "only": {"arms": ["base"]}}]),
    }
    tour = Request("tour", _study(TOUR), "full")
    plan = make_plan(tour, MATERIALS, find=lambda name: (name, studies[name]))
    second = next(t for t in plan.trials if t.seed == 1 and len(t.uses) == 2)
    assert [name for name, _ in second.measurements] == ["latency"]
    assert [(u.study, u.measurements) for u in second.uses] == [("positions", ()), ("kv", ("latency",))]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"measurements": [{"name": "latency", "only": {"arms": ["zz"]}}]}, r"latency\.only: no arm 'zz'; accepted: none"),
    ({"measurements": [{"name": "latency", "only": {"seeds": 0}}]}, "seeds"),
    ({"measurements": [{"name": "latency", "only": {"seed": 1}}]}, "only.seed: unknown field.*seeds, arms"),
    ({"measurements": ["latncy"]}, "'latncy' .did you mean 'latency'"),
    ({"measurements": [{"name": "latency", "batch": [1]}]}, "latency: option 'batch'.*accepted: batches"),
    ({"budgets": {"full": {"sweep": {"rates": RATES, "arms": ["zz"]}}}}, r"full\.sweep: no arm 'zz'"),
    ({"budgets": {"full": {"sweep": {"rates": [0.1]}}}}, "rates"),
    ({"budgets": {"full": {"sweep": {"rates": [0.1, 0.1]}}}}, "0.1 stands twice"),
    ({"budgets": {"full": {"sweep": {"rates": [0.1, -0.1]}}}}, "rates.1"),
    ({"budgets": {"full": {"sweep": {"rates": RATES, "arms": ["rope"], "tune": True}}}}, "every arm is swept"),
]


@pytest.mark.parametrize("changes,message", BAD)
def test_bad_studies_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _study(POSITIONS, **changes)


def test_a_sweep_is_planned_besides_and_shares_the_runs_at_the_recipes_rate() -> None:
    plan = _plan(arms=["none", "rope"])
    assert len(plan.trials) == 9 + 2 * 2
    extra = [t for t in plan.trials if t.uses[0].sweeps]
    assert {(t.uses[0].arm, t.seed, t.rate) for t in extra} == {(a, 0, r) for a in ("none", "rope") for r in RATES[::2]}
    assert {t.recipe["optimizer"]["lr"] for t in extra} == {0.001, 0.016} and not any(t.measurements for t in extra)
    both = [t for t in plan.trials if len(t.uses) == 2]
    assert {(t.uses[0].arm, t.seed, t.rate) for t in both} == {("none", 0, 0.004), ("rope", 0, 0.004)}
    assert len({t.recipe_digest for t in plan.trials}) == 1
    assert extra[0].name == "s/none seed 0, rate 0.001"


def _run(tmp_path: Path, request: Request, **changes: Any) -> Finished:
    return run_study(request, tmp_path, _session(**changes))


def _swept(done: Finished) -> dict[str, Any]:
    return {r.arm: r.values for r in done.results if r.kind == "sweep" and r.seed is None}


def _losses(done: Finished, arm: str) -> list[float]:
    tree = done.plan.stages[0].models[arm][0]
    return [loss(tree, 0, {"optimizer": {"lr": rate}}) for rate in RATES]


def test_sweeps_give_sweep_lines_and_leave_the_table_alone(tmp_path: Path) -> None:
    done = _run(tmp_path, _sweeping())
    found = _swept(done)
    for arm in FOUND:
        assert found[arm]["learning_rate"] == RATES and found[arm]["loss_nats"] == _losses(done, arm)
    trials = [r for r in done.results if r.kind == "trial"]
    assert len(trials) == 9 and {r.values["learning_rate"] for r in trials} == {0.004}
    assert len({r.recipe_digest for r in done.results if r.recipe_digest}) == 1
    (study,) = [r for r in done.results if r.kind == "study"]
    assert (
        "differ by a factor of 4" in study.values["note"] and "alibi 0.016 (the largest tried)" in study.values["note"]
    )
    again = _run(tmp_path, _sweeping(), pool=replace(POOL, function="tests.study.toy_trials:wordy"))
    assert again.failed == () and sorted(map(repr, again.results)) == sorted(map(repr, done.results))


def test_tuned_arms_take_the_rates_of_their_sweeps(tmp_path: Path) -> None:
    done = _run(tmp_path, _sweeping(tune=True))
    trials = [r for r in done.results if r.kind == "trial"]
    assert len(trials) == 9 and {(r.arm, r.values["learning_rate"]) for r in trials} == set(FOUND.items())
    for r in trials:
        tree = done.plan.stages[0].models[str(r.arm)][0]
        assert r.values["loss_nats"] == loss(tree, int(r.seed or 0), {"optimizer": {"lr": FOUND[str(r.arm)]}})
    assert len({r.recipe_digest for r in done.results if r.recipe_digest}) == 1
    (study,) = [r for r in done.results if r.kind == "study"]
    assert study.values["note"].endswith("Every arm was trained with the best rate of its own sweep.")
    again = _run(tmp_path, _sweeping(tune=True), pool=replace(POOL, function="tests.study.toy_trials:wordy"))
    assert again.failed == () and sorted(map(repr, again.results)) == sorted(map(repr, done.results))


def test_a_rate_that_a_repaired_sweep_finds_replaces_the_runs_at_the_old_one(tmp_path: Path) -> None:
    broken = replace(POOL, function="tests.study.toy_trials:no_high_rates")
    first = _run(tmp_path, _sweeping(tune=True), pool=broken)
    assert {f.trial.rate for f in first.failed} == {0.016}
    assert {r.values["learning_rate"] for r in first.results if r.kind == "trial" and r.arm == "alibi"} == {0.004}
    done = _run(tmp_path, _sweeping(tune=True))
    trials = [r for r in done.results if r.kind == "trial"]
    assert len(trials) == 9 and {(r.arm, r.values["learning_rate"]) for r in trials} == set(FOUND.items())
    assert sum(r.kind == "measure" for r in done.results) == 9


def test_a_tuned_tour_tunes_its_synthesis_too(tmp_path: Path) -> None:
    text = TOUR.replace("{recipe.tokens: 2048}", "{recipe.tokens: 2048}, sweep: {rates: [0.001, 0.004], tune: true}")
    done = _run(tmp_path, Request("tour", _study(text), "full"), find=_find)
    rates = {(r.study, r.arm): r.values["learning_rate"] for r in done.results if r.kind == "trial"}
    assert rates["synthesis", "chosen"] == rates["synthesis", "baseline"] == 0.004
    swept = [r for r in done.results if r.kind == "sweep" and r.study == "synthesis" and r.seed is None]
    assert [r.arm for r in swept] == ["baseline", "chosen"]


def test_the_optimum_is_the_parabolas() -> None:
    rates = np.array([0.001, 0.002, 0.006, 0.02])
    losses = 2.0 + 0.3 * (np.log(rates) - np.log(0.003)) ** 2
    a, b, _ = np.polyfit(np.log(rates[:3]), losses[:3], 2)
    curve = Curve(tuple(rates), tuple(losses))
    assert curve.optimum == pytest.approx(math.exp(-b / (2 * a))) == pytest.approx(0.003)
    assert Curve((1.0, 2.0, 4.0), (3.0, 2.0, None)).optimum == 2.0
    assert Curve((1.0, 2.0, 4.0), (1.0, 2.0, 3.0)).optimum == 1.0
    assert Curve((1.0, 2.0), (None, None)).optimum is None


def _lines(points: dict[str, list[float | None]]) -> list[Result]:
    return [
        Result(kind="sweep", study="s", arm=arm, seed=0, values={"learning_rate": rate, "loss_nats": value})
        for arm, losses in points.items()
        for rate, value in zip(RATES, losses)
    ]


def test_agreement_is_within_a_factor_of_two() -> None:
    stage = _plan().stages[0]
    close = _lines({"none": [2.0, 1.0, 2.0], "rope": [2.0, 1.0, 1.7]})
    assert note(close, stage).startswith("The arms' best learning rates agree within a factor of two")
    beyond = _lines({"none": [2.0, 1.0, 0.9], "rope": [2.0, 1.0, 0.9]})
    assert note(beyond, stage).startswith("Whether the arms' best learning rates agree is open")
    far = _lines({"none": [2.0, 1.0, 2.0], "rope": [1.0, 2.0, None]})
    assert "a difference between them may be the rate's" in note(far, stage) and "smallest tried" in note(far, stage)
    assert best_rates(far, stage) == {"none": 0.004, "rope": 0.001} and note([], stage) == ""
    assert curves(far, stage)["rope"].losses == (1.0, 2.0, None)
    about = Result(kind="study", study="s", values={})
    assert [r.arm for r in sweep_results(far, stage, about)] == ["none", "rope"]


def test_the_kept_model_is_made_again_where_it_is_gone(tmp_path: Path) -> None:
    request = Request("tour", _study(TOUR), "full")
    _run(tmp_path, request, find=_find)
    (tmp_path / "synthesis").rmdir()
    done = _run(tmp_path, request, find=_find)
    assert (tmp_path / "synthesis").is_dir()
    chosen = [r for r in done.results if r.kind == "trial" and r.arm == "chosen"]
    assert sorted(r.seed or 0 for r in chosen) == [0, 1, 2]


def test_a_baseline_that_wins_everywhere_is_kept_too(tmp_path: Path) -> None:
    worse = {"alibi": {"model.position": "bad"}}
    find = {"positions": _study(POSITIONS, arms=worse, claims=[], budgets={}), "kv": _study(KV)}
    text = "{title: Tour, stages: [positions, {name: best, synthesis: {}}]}"
    done = _run(tmp_path, Request("tour", _study(text), "full"), find=lambda name: (name, find[name]))
    (line,) = [r for r in done.results if r.kind == "synthesis"]
    assert line.values["changes"] == {} and line.values["checkpoint"] == "best"
    assert (tmp_path / "best").is_dir() and BEST["bad"] == 0.004
