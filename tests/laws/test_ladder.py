"""A ladder from YAML to findings, with trials that follow a known law; and what a real model's numbers are."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from assay.laws.fits import Options
from assay.laws.ladder import Ladder, LawClaim, judged, load_ladder, resolved
from assay.laws.law import Objective
from assay.laws.plan import known, plan
from assay.laws.points import read_rows
from assay.laws.run import FINDINGS, PREDICTION, best_rates, climb, foreseen, found_in, said, settings
from assay.model.lm import LM
from assay.spec.load import shelf
from assay.spec.result import read_results
from assay.study.materials import materials
from assay.study.run import Session
from assay.study.runners.local import Pool
from tests.laws import toy
from tests.train.small import MODEL, RECIPE

WIDTHS = (8, 12, 16, 24, 32, 40, 48)
LADDER: dict[str, Any] = {
    "title": "Toy",
    "sizes": {f"w{w}": {"model.d_model": w, "model.blocks.*.ffn.width": 2 * w} for w in WIDTHS},
    "warmup": 2,
    "budgets": {
        "smoke": {"flops": [2e8, 8e8, 3.2e9, 1.28e10], "tokens_per_param": [0.2, 60], "rates": [2e-3, 4e-3, 8e-3]},
        "quick": {"flops": [2e8, 8e8], "tokens_per_param": [0.2, 60]},
    },
    "claims": [
        {"id": "a", "text": "alpha", "source": "toy", "value": "approach3.constants.alpha", "low": 0.35, "high": 0.45},
        {"id": "m", "text": "miss", "source": "toy", "value": "top.mean_miss_nats", "high": 0.01},
    ],
}
FEW = Options(draws=0, objective=Objective(starts=4))


def ladder(folder: Path, budget: str = "smoke", **changes: Any) -> Ladder:
    model = MODEL | {"blocks": {"b": MODEL["blocks"]["b"]}}
    (folder / "base.yaml").write_text(yaml.safe_dump(model))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    files = {"base": str(folder / "base.yaml"), "recipe": str(folder / "recipe.yaml")}
    (folder / "toy.yaml").write_text(yaml.safe_dump(LADDER | files | changes, sort_keys=False))
    return resolved(*load_ladder(folder / "toy.yaml"), budget)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr("assay.laws.run.RUN_TRIAL", "tests.laws.toy:run_trial")
    return Session(materials(), Pool(1), note=lambda text: None)


def test_a_rung_buys_its_flops_and_shares_the_trunk_of_longer_runs(tmp_path: Path) -> None:
    made = ladder(tmp_path)
    for size in made.sizes:
        assert size.params == sum(p.numel() for p in LM(size.spec).parameters()) == toy.params(size.spec.model_dump())
    for rung, flops in enumerate(made.rungs.flops):
        assert len(made.on(rung)) >= 3
        for size in made.on(rung):
            recipe = made.recipe_of(size, rung)
            assert isinstance(recipe.tokens, int) and recipe.tokens % recipe.batch.tokens == 0
            assert abs(recipe.tokens * size.flops / flops - 1) < 0.5 * recipe.batch.tokens * size.flops / flops + 1e-9
            assert recipe.schedule.kind == "wsd" and recipe.schedule.warmup == 2 and recipe.schedule.final == 0.0
            assert recipe.schedule.decay == pytest.approx(0.2 * recipe.steps(0), abs=0.51)
    swept = {trial.uses[0].arm for trial in made.sweep()}
    assert swept == {size.name for size in made.sizes if made.first(size) not in (None, made.top)}
    keys = [trial.key for rung in range(4) for trial in made.runs(rung, {})]
    assert len(set(keys)) == len(keys)


def test_the_top_rung_is_foreseen_before_it_is_run_and_a_second_climb_does_nothing(
    tmp_path: Path, session: Session
) -> None:
    made, out = ladder(tmp_path), tmp_path / "out"
    assert all(not done for _, done in foreseen(made, out))
    done = climb(made, out, session, FEW)
    assert done.failed == ()
    results = read_results(out / "results.jsonl")
    top = made.study(made.top)
    before = {r.study: r.values["foreseen"] for r in results if r.kind == "trial"}
    assert before.pop(top) is True and not any(before.values())
    assert done.findings["top"]["mean_miss_nats"] < 0.01 and len(done.findings["top"]["rows"]) == len(made.on(3))
    assert done.findings["approach3"]["constants"]["alpha"]["value"] == pytest.approx(toy.LAW.alpha, abs=0.03)
    assert [r.values["outcome"] for r in results if r.kind == "claim"] == ["confirmed", "confirmed"]
    assert set(best_rates(made, results).values()) == {toy.BEST}
    assert done.findings["batches"]["law"]["exponent"] == pytest.approx(-4.0)
    assert all(done for _, done in foreseen(made, out))
    told = said(results, PREDICTION)
    again = climb(made, out, session, FEW)
    assert again.findings == done.findings == said(results, FINDINGS) == found_in(out)
    assert said(read_results(out / "results.jsonl"), PREDICTION) == told
    with pytest.raises(ValueError, match="another study's plan"):
        climb(ladder(tmp_path, "quick"), out, session, FEW)
    _plans(out, done.findings)


def _plans(out: Path, findings: dict[str, Any]) -> None:
    made = plan(1e12, known(read_rows(out), FEW))
    assert made["params"]["value"] == pytest.approx(toy.LAW.best_params(1e12), rel=0.15)
    assert made["beyond"] > 50
    told = settings(made, findings)
    assert told is not None and told["batch_tokens"] == pytest.approx(100 / made["loss_nats"]["value"] ** 4, rel=0.01)
    assert told["rate"] is not None
    assert settings(made, None) is None


@pytest.mark.slow
def test_runs_that_fail_are_named_and_made_up_for(tmp_path: Path, session: Session, monkeypatch: Any) -> None:
    made, out = ladder(tmp_path), tmp_path / "out"
    monkeypatch.setattr("assay.laws.run.RUN_TRIAL", "tests.laws.toy:failing")
    with pytest.raises(ValueError, match="no runs"):
        climb(made, out, session, FEW)
    monkeypatch.setattr("assay.laws.run.RUN_TRIAL", "tests.laws.toy:run_trial")
    assert climb(made, out, session, FEW).failed == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": {"smoke": {"flops": [8e8, 2e8]}}}, r"flops: \[800000000.0, 200000000.0\]; accepted"),
        ({"budgets": {"tiny": {"flops": [1e8, 2e8]}}}, "budgets: 'tiny'; accepted: smoke, quick, full"),
        ({"budgets": {"smoke": {"flops": [1e8, 2e8], "sizes": ["w9"]}}}, "no size 'w9'; accepted: w8"),
        ({"budgets": {"smoke": {"flops": [1e5, 8e8]}}}, "at least 3 are needed: widen tokens_per_param"),
        ({"decay": 1.5}, "decay: .*less than 1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder(tmp_path, **changes)


def test_a_ladder_sets_tokens_and_schedule_itself(tmp_path: Path) -> None:
    ladder(tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.tokens: a ladder sets tokens"):
        resolved(*load_ladder(tmp_path / "toy.yaml"), "smoke", {"recipe.tokens": 5})
    with pytest.raises(ValueError, match="budget 'full'; accepted: smoke, quick"):
        resolved(*load_ladder(tmp_path / "toy.yaml"), "full")


def test_a_claim_is_judged_by_its_whole_interval() -> None:
    found = {"x": {"value": 0.5, "interval": [0.4, 0.6]}, "y": 0.7, "z": None}
    ranges = [("x", 0.45, 0.55), ("x", 0.55, 0.9), ("x", 0.7, 0.9), ("y", 0.0, 0.6), ("y", 0.6, 1.0), ("z", 0.0, 1.0)]
    claims = [LawClaim(id=str(i), text="", source="", value=v, low=a, high=b) for i, (v, a, b) in enumerate(ranges)]
    assert [one["outcome"] for one in judged(claims, found)] == [
        "confirmed",
        "not distinguishable",
        "contradicted",
        "contradicted",
        "confirmed",
        "not tested",
    ]


@pytest.mark.parametrize("name", shelf("ladders"))
def test_shipped_ladders_resolve_at_every_budget(name: str) -> None:
    stem, spec = load_ladder(name)
    for budget in spec.budgets:
        made = resolved(stem, spec, budget)
        assert len({s.digest for s in made.sizes}) == len(made.sizes)
        ids = {size.spec.context for size in made.sizes}
        assert min(ids) >= made.recipe.batch.length
