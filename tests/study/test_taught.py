"""Arms that change how they are trained, and not only the model."""

from __future__ import annotations

from typing import Any

import pytest

from assay.spec.load import validate
from assay.study.materials import materials
from assay.study.plan import Plan, Request, make_plan
from assay.study.spec import StudySpec, load_study
from assay.train.optim.specs import OPTIMIZERS

STUDY: dict[str, Any] = {
    "title": "Optimisers",
    "base": "lab-64",
    "recipe": "smoke",
    "arms": {
        "adamw": {},
        "lion": {"recipe.optimizer": {"kind": "lion"}},
        "wide": {"model.blocks.*.ffn.width": 200, "recipe.optimizer": {"kind": "lion"}},
    },
    "seeds": 1,
    "budgets": {"quick": {"sweep": {"rates": [4e-3, 8e-3], "tune": True}}},
}


def planned(rates: Any = None, **changes: Any) -> Plan:
    study = validate(StudySpec, STUDY | changes, "study")
    return make_plan(Request("s", study, "quick"), materials(), rates=rates)


def test_an_arm_is_trained_by_its_own_recipe_in_one_table() -> None:
    plan = planned()
    (stage,) = plan.stages
    found = {t.uses[0].arm: t for t in plan.trials if any(not use.sweeps for use in t.uses)}
    assert {arm: t.recipe["optimizer"]["kind"] for arm, t in found.items()} == {
        "adamw": "adamw", "lion": "lion", "wide": "lion"}  # fmt: skip
    assert {t.recipe_digest for t in found.values()} == {stage.recipe_digest}
    assert len({t.spec_digest for t in found.values()}) == len({t.key for t in found.values()}) == 3
    assert found["adamw"].spec == found["lion"].spec != found["wide"].spec


def test_rates_of_a_sweep_are_in_proportion_to_the_arms_own() -> None:
    swept = {(u.arm, t.rate) for t in planned().trials for u in t.uses if u.sweeps}
    arms = {arm: sorted(rate for other, rate in swept if other == arm) for arm, _ in swept}
    assert arms["adamw"] == [4e-3, 8e-3]
    assert arms["lion"] == arms["wide"] == pytest.approx([4e-4, 8e-4])
    tuned = planned({"s": {"lion": 8e-4}}).trials
    rates = {u.arm: t.rate for t in tuned for u in t.uses if not u.sweeps}
    assert rates == {"adamw": 4e-3, "lion": 8e-4, "wide": pytest.approx(4e-4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe.batch.length": 64},
            "'recipe.batch.length' is not a path .*accepted: model.…, recipe.optimizer, recipe",
        ),
        ({"recipe.optimizer": {"kind": "lyon"}}, "s: arm odd: .*optimizer.kind: 'lyon'; accepted: adamw"),
    ],
)
def test_what_an_arm_may_not_change_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(arms={"plain": {}, "odd": changes})


def test_the_shipped_study_plans_every_optimiser() -> None:
    name, study = load_study("optimisers")
    plan = make_plan(Request(name, study, "full"), materials())
    kinds = {u.arm.replace("-", "_"): t.recipe["optimizer"]["kind"] for t in plan.trials for u in t.uses}
    assert kinds == {kind: kind for kind in OPTIMIZERS}


def test_text_is_cut_down_with_the_budget() -> None:
    """Sixteen epochs are sixteen at every budget."""
    for budget, tokens in (("smoke", 98304), ("full", 2097152)):
        plan = make_plan(Request(*load_study("repetition"), budget), materials())
        found = {u.arm: t.recipe for t in plan.trials for u in t.uses if not u.sweeps}
        assert found["sixteen"]["batch"]["epochs"] == 16 and found["once"]["batch"]["epochs"] is None
        assert {recipe["tokens"] for recipe in found.values()} == {tokens}
