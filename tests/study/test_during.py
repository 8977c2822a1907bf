"""Measurements during training: what a real run says, who gets it, what claims make of it, how long it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from assay.measure.subject import Subject
from assay.measure.topics import run, seconds
from assay.spec.load import dump
from assay.spec.result import Result
from assay.study.claims import parse
from assay.study.evidence import Evidence
from assay.study.judge import Court, judge
from assay.study.plan import Request, make_plan
from assay.study.runners.folder import Folder
from assay.study.runners.local import run_trials
from assay.study.spec import MeasurementSpec, StudySpec
from assay.study.times import fixed_seconds
from assay.study.trial import run_trial
from assay.study.trials import Use
from tests.study.test_local import TWO
from tests.study.test_plan import KV, POSITIONS, _study
from tests.study.toy import MATERIALS, RECIPE
from tests.train import small

DURING = {"name": "extrapolation", "ratios": [1, 8], "during": True}


def _job(tmp_path: Path, *asked: str, **changes: Any) -> dict[str, Any]:
    names = {"study": "s", "arm": "a", "seed": 0, "spec_digest": "d", "recipe_digest": "e", "room": str(tmp_path)}
    recipe = small.recipe(**{"evaluation__points": 3, **changes})
    measurements = [{"name": name, "options": {}} for name in asked]
    return {**names, "spec": dump(small.model()), "recipe": dump(recipe), "measurements": measurements}


def _lines(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    told: list[float] = []
    found = run_trial(job, lambda event: told.append(event["fraction"]))
    assert told == sorted(told)
    return {line["values"].get("what", line["kind"]): line["values"] for line in found}


def test_a_real_run(tmp_path: Path) -> None:
    found = _lines(_job(tmp_path, "attention", "training.attention"))
    during = found["training.attention"]["rows"]
    # Eight steps of 64 tokens: validations after 3, 5 and 8, two layers each.
    assert [(r["part"], r["at_tokens"], r["layer"]) for r in during] == [
        (part, tokens, layer) for part, tokens in ((0.333, 192), (0.667, 320), (1.0, 512)) for layer in (0, 1)
    ]
    assert [{k: v for k, v in r.items() if k not in ("part", "at_tokens")} for r in during[4:]] == (
        found["attention"]["rows"]
    )
    # The same steps, taken here.
    how = small.recipe(evaluation__points=3)
    held = small.learner(how=how)
    torch.manual_seed(how.seed)
    for number in range(5):
        held.step(number, 8)
        if number in (2, 4):
            subject = Subject(held.model.eval(), held.spec, how, small.data().tokenizer, small.data())
            ((_, mine),) = run("attention", subject)
            held.model.train()
            assert [r["sink_mass"] for r in during if r["at_tokens"] == 64 * (number + 1)] == pytest.approx(
                [r["sink_mass"] for r in mine["rows"]], rel=1e-6
            )
    without = _lines(_job(tmp_path, "attention"))
    same = ("loss_nats", "curve", "valid_curve", "by_position", "tokens", "steps", "train_flops")
    assert all(found["trial"][name] == without["trial"][name] for name in same)
    assert set(found) - set(without) == {"training.attention"} and found["attention"] == without["attention"]


def test_refusals_failures_and_what_was_found_before_a_run_diverged(tmp_path: Path) -> None:
    found = _lines(_job(tmp_path, "passkey", "training.passkey", "failures", "training.failures"))
    assert found["training.passkey"]["rows"] == [] and "42 tokens or more" in found["training.passkey"]["reason"]
    assert {(r["part"], r["metric"]) for r in found["training.failures"]["rows"]} >= {(0.333, "repeated_share")}
    hot = {"optimizer__lr": 1e18, "clip": None, "schedule__warmup": 0, "evaluation__points": 8}
    lost = _lines(_job(tmp_path, "lens", "training.lens", **hot))
    assert lost["trial"]["diverged"] is True and "lens" not in lost
    assert {r["at_tokens"] for r in lost["training.lens"]["rows"]} == {
        64 * (i + 1) for i in range(lost["trial"]["steps"] - 1)
    }


def test_training_memory_is_not_that_of_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.study import trial

    def greedy(name: str, subject: Subject, options: dict[str, Any]) -> list[Any]:
        torch.ones(100 << 20, dtype=torch.uint8)
        return []

    plain = _lines(_job(tmp_path))["trial"]["peak_memory_bytes"]
    monkeypatch.setattr(trial, "measured", greedy)
    busy = _lines(_job(tmp_path, "lens", "training.lens"))["trial"]["peak_memory_bytes"]
    assert busy < plain + (50 << 20)
    # The most before a measurement counts though less is held later on.
    held = iter([10**12])
    monkeypatch.setattr(trial, "peak_bytes", lambda: next(held, 1))
    assert _lines(_job(tmp_path, "lens", "training.lens"))["trial"]["peak_memory_bytes"] == 10**12


def test_stages_that_share_a_run_get_what_they_asked_for(tmp_path: Path) -> None:
    def find(name: str) -> tuple[str, StudySpec]:
        return name, _study(POSITIONS) if name == "positions" else _study(KV, measurements=[DURING])

    tour = _study("{title: Tour, stages: [positions, kv]}")
    plan = make_plan(Request("tour", tour, "full"), MATERIALS, find=find)
    with Folder(tmp_path) as folder:
        folder.bind(plan.digest, {})
        assert run_trials(plan.trials, folder, TWO) == []
        found = {(r.study, r.arm, r.seed) for r in folder.read() if r.values.get("what") == "training.extrapolation"}
        assert found == {("kv", arm, seed) for arm in ("base", "kv1") for seed in (0, 1)}
        # What was not measured during a run cannot be copied from it.
        (again,) = [t for t in plan.trials if t.uses[0].arm == "none" and t.seed == 2]
        wanted = MeasurementSpec.model_validate(DURING)
        new = plan.stages[1].trial("base", 2, again.rate, Use("new", "base", wanted.names), [wanted])
        assert folder.left([again]) == [] and folder.left([new]) == [new]


def test_a_budget_keeps_a_measurement_whole() -> None:
    asked = ["latency", DURING]
    plan = make_plan(Request("s", _study(POSITIONS, measurements=asked), "full"), MATERIALS)
    assert plan.trials[0].uses[0].measurements == ("latency", "extrapolation", "training.extrapolation")
    assert dict(plan.trials[0].measurements)["training.extrapolation"] == {"ratios": [1, 8]}
    smoke = make_plan(Request("s", _study(POSITIONS, measurements=asked), "smoke"), MATERIALS)
    assert smoke.trials[0].uses[0].measurements == ("latency",)
    assert plan.digest != make_plan(Request("s", _study(POSITIONS), "full"), MATERIALS).digest


def test_every_validation_takes_its_time() -> None:
    recipe = {**RECIPE, "evaluation": {"tokens": 1024, "points": 4}}
    plan = make_plan(Request("s", _study(POSITIONS, measurements=[DURING], recipe=recipe), "full"), MATERIALS)
    assert fixed_seconds(plan) == pytest.approx([0.5 + 4 * seconds("extrapolation")] * 9)


BAD = [
    ("mean(training.extrapolation.loss_nats, arm=rope, part=0.5) < 3", ["extrapolation"], "accepted with.*`during`"),
    ("mean(training.attenton.sink_mass, arm=rope) < 3", [], "claim c1: measurement 'attenton'.*'attention'"),
    ("mean(attenton.sink_mass, arm=rope) < 3", [], "claim c1: measurement 'attenton'.*'attention'"),
    ("mean(other.extrapolation.loss_nats, arm=rope) < 3", [DURING], "is not a metric.*training.attention.sink_mass"),
    ("mean(training.extrapolation.x.loss_nats, arm=rope) < 3", [DURING], "is not a metric"),
]


@pytest.mark.parametrize("test,asked,message", BAD)
def test_claims_about_what_nothing_measures_are_refused(test: str, asked: list[Any], message: str) -> None:
    claims = [{"id": "c1", "text": "", "source": "", "test": test}]
    with pytest.raises(ValueError, match=message):
        _study(POSITIONS, claims=claims, measurements=asked)


def test_claims_choose_a_part_of_the_training() -> None:
    test = "mean(training.attention.sink_mass, arm=full, part=0.25, layer=1) < mean(training.attention.sink_mass, "
    _study(
        POSITIONS.replace("rope", "full"),
        measurements=[{"name": "attention", "during": True}],
        claims=[{"id": "c1", "text": "", "source": "", "test": test + "arm=full, part=1, layer=1)"}],
    )
    results = []
    for seed in range(3):
        results.append(Result(kind="trial", study="s", arm="full", seed=seed, values={"diverged": False}))
        rows = [
            {"layer": layer, "part": part, "at_tokens": int(1000 * part), "sink_mass": layer * part + 0.01 * seed}
            for part in (0.25, 1.0)
            for layer in (0, 1)
        ]
        rows_end = [{"layer": layer, "sink_mass": 9.0} for layer in (0, 1)]
        for what, found in (("training.attention", rows), ("attention", rows_end)):
            values = {"what": what, "rows": found}
            results.append(Result(kind="measure", study="s", arm="full", seed=seed, values=values))  # type: ignore[arg-type]
    evidence = Evidence(results, "s")
    found = evidence.samples("training.attention.sink_mass", "full", {"part": 0.25, "layer": 1})
    assert found == pytest.approx({0: 0.25, 1: 0.26, 2: 0.27})
    assert evidence.samples("attention.sink_mass", "full", {"layer": 1}) == {0: 9.0, 1: 9.0, 2: 9.0}
    court = Court("full", ("full",))
    assert judge(parse(test + "arm=full, part=1, layer=1)"), evidence, court)[0] == "confirmed"
    assert judge(parse(test + "arm=full, part=1, layer=0)"), evidence, court)[0] == "contradicted"
    assert judge(parse(test + "arm=full, part=0.3, layer=1)"), evidence, court)[0] == "not tested"
