"""Studies read from YAML, plans, matching, sharing and time budgets, on models that are nested dicts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.measure.topics import seconds as measuring_seconds
from assay.spec.load import parse_yaml, validate
from assay.study.match import nearest
from assay.study.plan import (
    TOKEN_STEP,
    Request,
    make_plan,
)
from assay.study.spec import StudySpec, load_study
from assay.study.times import expected_seconds, fit_scale, wall_seconds
from tests.study.toy import MATERIALS
from tests.study.toy_trials import params

POSITIONS = """
title: Positions
question: Which position scheme learns fastest?
base: toy
recipe: toy
seeds: 3
measurements: [latency, {name: extrapolation, ratios: [1, 8]}]
arms:
  none: {}
  rope: {model.position: rope, note: rotary}
  alibi: {title: ALiBi, role: measure, changes: {model.position: alibi}}
claims:
  - {id: c1, text: RoPE wins, source: RoFormer, test: "verdict(loss_nats, arm=rope) == better"}
budgets:
  smoke: {seeds: {verdict: 2, measure: 1}, measurements: [latency], overrides: {recipe.tokens: 8192}}
  quick: {seeds: 5, arms: [rope]}
"""
KV = """
title: Key and value heads
base: toy
recipe: toy
seeds: [0, 1]
arms:
  kv1: {model.kv: 1}
match: {equal: params, tune: model.layers.*.ffn.width, within: 0.03}
measurements: [{name: extrapolation, ratios: [1, 8]}]
"""


def _study(text: str, **changes: Any) -> StudySpec:
    return validate(StudySpec, {**parse_yaml(text, "test"), **changes}, "test")


def _request(text: str = POSITIONS, budget: str = "full", overrides: Mapping[str, Any] | None = None) -> Request:
    return Request("s", _study(text), budget, overrides or {})


def test_yaml_shorthands() -> None:
    study = _study(POSITIONS)
    assert study.base_arm == "none" and list(study.all_arms) == ["none", "rope", "alibi"]
    assert study.arms["rope"].changes == {"model.position": "rope"} and study.arms["rope"].note == "rotary"
    assert study.seeds == (0, 1, 2) and study.measurements[1].options == {"ratios": [1, 8]}
    assert _study(KV).base_arm == "base"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"armz": {}}, "armz: unknown field.*arms"),
    ({"base": None}, "base: missing"),
    ({"arms": {"a": {"recipe.rate": 1}}}, "recipe.rate.*accepted: model"),
    ({"arms": {"a": {"colour": 1}}}, "arms.a.colour: unknown field"),
    ({"arms": {"a": {}, "b": {}}}, "a and b both change nothing"),
    ({"arms": {"base": {"model.kv": 1}}, "claims": []}, "base arm is the one that changes nothing"),
    ({"claims": [{"id": "x", "text": "", "source": "", "test": "1 +"}]}, "claim x.*not a test"),
    ({"claims": [{"id": "x", "text": "", "source": "", "test": "verdict(m, arm=zz) == better"}]}, "no arm 'zz'.*none"),
    ({"stages": ["a"]}, "a study with `stages` has no base"),
    ({"seeds": []}, "seeds"),
    ({"seeds": [1, 1]}, "1 stands twice"),
    ({"budgets": {"smoke": {"arms": ["zz"]}}}, "no arm 'zz'"),
    ({"budgets": {"smoke": {"overrides": {"seed": 1}}}}, "not a path"),
    ({"match": {"equal": "beauty", "tune": "model.kv"}}, "params"),
    ({"match": {"equal": "params", "tune": "model.position"}}, "matching tunes"),
]


@pytest.mark.parametrize("changes,message", BAD)
def test_bad_studies_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _study(POSITIONS, **changes)


def test_load_study_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(POSITIONS)
    name, study = load_study(tmp_path / "mine.yaml")
    assert name == "mine" and study.title == "Positions"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_study("nowhere")


def test_order_is_seed_by_seed_with_the_base_arm_first() -> None:
    plan = make_plan(_request(), MATERIALS)
    assert [(t.uses[0].arm, t.seed) for t in plan.trials] == [
        (a, s) for s in range(3) for a in ("none", "rope", "alibi")
    ]


def test_budgets_choose_seeds_by_role_arms_measurements_and_overrides() -> None:
    smoke = make_plan(_request(budget="smoke"), MATERIALS)
    assert sorted((t.uses[0].arm, t.seed) for t in smoke.trials) == [
        ("alibi", 0),
        ("none", 0),
        ("none", 1),
        ("rope", 0),
        ("rope", 1),
    ]
    assert {t.tokens for t in smoke.trials} == {8192}
    assert {m for t in smoke.trials for m, _ in t.measurements} == {"latency"}
    quick = make_plan(_request(budget="quick"), MATERIALS)
    assert quick.stages[0].arms == ("none", "rope") and {t.seed for t in quick.trials} == set(range(5))
    with pytest.raises(ValueError, match="accepted: smoke, quick, full"):
        make_plan(_request(budget="huge"), MATERIALS)


def test_overrides_reach_every_arm_and_the_recipe() -> None:
    plan = make_plan(_request(overrides={"model.kv": 2, "recipe.tokens": 4096}), MATERIALS)
    assert {(t.spec["kv"], t.tokens) for t in plan.trials} == {(2, 4096)}
    assert plan.trials[0].recipe_digest != make_plan(_request(), MATERIALS).trials[0].recipe_digest
    with pytest.raises(ValueError, match=r"kvv.*matches nothing|seed: an override"):
        make_plan(_request(overrides={"seed": 2}), MATERIALS)
    with pytest.raises(ValueError, match="arms none and rope are the same model"):
        make_plan(_request(overrides={"model.position": "rope"}), MATERIALS)


def test_arms_are_matched_to_the_base_arm() -> None:
    stage = make_plan(_request(KV), MATERIALS).stages[0]
    base, arm = (params(stage.models[a][0]) for a in ("base", "kv1"))
    # By hand: 2 layers * (24 w + 64 kv) = 2048; kv 4 -> 1 frees 192 a layer, 8 more columns.
    assert stage.tuned == {"kv1": 40} and arm == base == 2048
    assert stage.changes("kv1") == {"model.kv": 1, "model.layers.*.ffn.width": 40}


def test_a_match_that_is_not_close_enough_is_refused() -> None:
    study = _study(KV, match={"equal": "params", "tune": "model.layers.*.ffn.width", "within": 1e-3, "multiple_of": 7})
    with pytest.raises(ValueError, match=r"within 0\.1% is accepted"):
        make_plan(Request("s", study, "full"), MATERIALS)
    with pytest.raises(ValueError, match="cannot be counted"):
        make_plan(_request(KV), replace(MATERIALS, sizes=None))


@given(st.integers(1, 50), st.integers(0, 1000), st.floats(1, 1e5))
def test_nearest_is_nearest(slope: int, offset: int, target: float) -> None:
    found = nearest(lambda n: slope * n + offset, target)
    exact = (target - offset) / slope
    gap = abs(slope * found + offset - target)
    assert gap <= min(abs(slope * max(1, n) + offset - target) for n in (int(exact), int(exact) + 1)) + 1e-9


def _tour(name: str) -> tuple[str, StudySpec]:
    return name, _study({"positions": POSITIONS, "kv": KV}[name])


TOUR = "{title: Tour, stages: [positions, kv], budgets: {full: {overrides: {recipe.tokens: 2048}}}}"


def test_stages_share_runs() -> None:
    plan = make_plan(Request("tour", _study(TOUR), "full"), MATERIALS, find=_tour)
    # positions: 3 arms x 3 seeds; kv: 2 arms x 2 seeds, of which the base arm's two already ran.
    assert len(plan.trials) == 9 + 2 and {t.tokens for t in plan.trials} == {2048}
    shared = [t for t in plan.trials if len(t.uses) == 2]
    assert {(t.seed, *((u.study, u.arm) for u in t.uses)) for t in shared} == {
        (0, ("positions", "none"), ("kv", "base")),
        (1, ("positions", "none"), ("kv", "base")),
    }
    assert dict(shared[0].measurements) == {"latency": {}, "extrapolation": {"ratios": [1, 8]}}
    assert shared[0].uses[1].measurements == ("extrapolation",)


def test_one_measurement_with_two_sets_of_options_on_one_run_is_refused() -> None:
    def find(name: str) -> tuple[str, StudySpec]:
        measured = [{"name": "extrapolation", "ratios": [2]}]
        return name, _study(KV, measurements=measured) if name == "kv" else _tour(name)[1]

    with pytest.raises(ValueError, match="two sets of options"):
        make_plan(Request("tour", _study(TOUR), "full"), MATERIALS, find=find)


def test_the_digest_follows_what_is_run() -> None:
    digests = [
        make_plan(request, MATERIALS).digest
        for request in (_request(), _request(), _request(budget="smoke"), _request(overrides={"recipe.rate": 1}))
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_expected_time_and_the_scale_that_fits() -> None:
    request = Request("s", _study(POSITIONS, measurements=[]), "full")
    plan = make_plan(request, MATERIALS)
    measured = expected_seconds(make_plan(_request(), MATERIALS), MATERIALS)
    seconds = expected_seconds(plan, MATERIALS)
    both = measuring_seconds("latency") + measuring_seconds("extrapolation")
    assert measured == pytest.approx([s + both for s in seconds])
    assert seconds == pytest.approx([2.5] * 9)  # 65536 tokens at 32768 a second, and 0.5 s of overhead
    assert wall_seconds(seconds, 2) == pytest.approx(12.5)  # five of nine on one of two workers
    scale = fit_scale(seconds, 7.5, 2)
    assert scale == pytest.approx(0.5)
    smaller = make_plan(request, MATERIALS, scale)
    assert {t.tokens for t in smaller.trials} == {32768} and len({t.recipe_digest for t in smaller.trials}) == 1
    assert fit_scale(seconds, 100, 2) == 1.0
    with pytest.raises(ValueError, match="fewer seeds or arms"):
        fit_scale(seconds, 2.0, 2)


def test_scaled_tokens_are_whole_steps() -> None:
    plan = make_plan(_request(), MATERIALS, 0.1234)
    assert {t.tokens % TOKEN_STEP for t in plan.trials} == {0}
    assert make_plan(_request(), MATERIALS, 1e-9).trials[0].tokens == TOKEN_STEP
