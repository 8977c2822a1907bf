"""A whole tour with planted effects: run, stopped, gone on with, judged, and the choice trained."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from assay.measure.topics import seconds as measuring_seconds
from assay.spec.result import read_results
from assay.study.plan import Request, make_plan
from assay.study.run import Session, foreseen, planned, run_study
from assay.study.runners.folder import Folder
from assay.study.runners.local import Pool
from assay.study.spec import StudySpec
from assay.study.tables import Live, plan_rows, plan_table
from assay.study.times import START_S, expected_seconds, wall_seconds
from tests.study.test_plan import KV, POSITIONS, _study
from tests.study.toy import MATERIALS
from tests.study.toy_trials import loss

TOUR = """
title: Tour
stages: [positions, kv, {name: synthesis, synthesis: {constraints: {state_bytes_per_token: 100}}}]
budgets: {full: {overrides: {recipe.tokens: 2048}}}
"""
POOL = Pool(2, "tests.study.toy_trials:run_trial")


def _find(name: str) -> tuple[str, StudySpec]:
    return name, _study({"positions": POSITIONS, "kv": KV}[name])


def _session(**changes: Any) -> Session:
    notes: list[str] = []
    return replace(Session(MATERIALS, POOL, find=_find, note=notes.append, environment=lambda: {"cores": 2}), **changes)


def _tour() -> Request:
    return Request("tour", _study(TOUR), "full")


def test_a_tour_from_runs_to_conclusions(tmp_path: Path) -> None:
    done = run_study(_tour(), tmp_path, _session(command="assay study run tour"))
    assert done.failed == ()
    lines = {(r.kind, r.study, r.arm): r for r in done.results if r.kind != "measure"}
    assert lines["verdict", "positions", "rope"].values["verdict"] == "better"
    assert lines["claim", "positions", None].values["outcome"] == "confirmed"
    assert lines["study", "kv", None].values["arms"][1]["changes"]["model.layers.*.ffn.width"] == 40
    assert lines["environment", "tour", None].values == {"cores": 2}
    synthesis = lines["synthesis", "synthesis", None].values
    assert [(c["study"], c["arm"]) for c in synthesis["choices"]] == [("positions", "rope"), ("kv", "kv1")]
    assert synthesis["choices"][0]["supported"] and not synthesis["choices"][1]["supported"]
    assert synthesis["changes"] == {"model.position": "rope", "model.kv": 1, "model.layers.*.ffn.width": 40}
    table = {row["metric"]: row for row in synthesis["table"]}
    assert table["loss_nats"]["verdict"] == "better" and table["state_bytes_per_token"]["delta"] == 16 - 64
    assert synthesis["checkpoint"] == "synthesis"
    chosen = [r for r in done.results if r.kind == "trial" and r.arm == "chosen"]
    tree, _ = MATERIALS.model("toy", synthesis["changes"])
    assert {r.seed: r.values["loss_nats"] for r in chosen} == {s: loss(tree, s) for s in range(3)}
    assert {r.recipe_digest for r in done.results if r.study == "positions"} == {chosen[0].recipe_digest}


def test_going_on_changes_nothing_and_runs_nothing(tmp_path: Path) -> None:
    first = run_study(_tour(), tmp_path, _session())
    broken = replace(POOL, function="tests.study.toy_trials:wordy")
    again = run_study(_tour(), tmp_path, _session(pool=broken))
    assert again.failed == () and sorted(map(repr, again.results)) == sorted(map(repr, first.results))
    with pytest.raises(ValueError, match="another study's plan"):
        run_study(replace(_tour(), budget="smoke"), tmp_path, _session())


def test_failed_trials_leave_their_arm_not_tested(tmp_path: Path) -> None:
    request = Request("s", _study(POSITIONS), "smoke")
    done = run_study(request, tmp_path, _session(pool=replace(POOL, function="tests.study.toy_trials:crashing")))
    assert {f.trial.uses[0].arm for f in done.failed} == {"rope", "alibi"}
    verdicts = {r.arm: r.values["verdict"] for r in done.results if r.kind == "verdict"}
    assert verdicts == {"rope": "not tested", "alibi": "not tested"}
    (claim,) = [r for r in done.results if r.kind == "claim"]
    assert claim.values["outcome"] == "not tested"


def test_ctrl_c_concludes_from_what_is_there(tmp_path: Path) -> None:
    class Impatient(Live):
        def finished(self, trial: Any, why: str | None) -> None:
            super().finished(trial, why)
            if self.done == 5:
                raise KeyboardInterrupt

    session = _session(watch=lambda trials: Impatient(trials, Console(file=io.StringIO())))
    with pytest.raises(KeyboardInterrupt):
        run_study(_tour(), tmp_path, session)
    kinds = [r.kind for r in read_results(tmp_path / "results.jsonl")]
    assert kinds.count("verdict") == 3 and kinds.count("study") == 3 and kinds.count("trial") >= 5
    assert run_study(_tour(), tmp_path, _session()).failed == ()


def test_a_constraint_that_nothing_meets_keeps_the_stages(tmp_path: Path) -> None:
    notes: list[str] = []
    text = TOUR.replace("100", "1")
    done = run_study(Request("tour", _study(text), "full"), tmp_path, _session(note=notes.append))
    assert any("no tested arm of positions" in note for note in notes)
    assert {r.kind for r in done.results} == {"environment", "study", "trial", "measure", "verdict", "claim"}


def test_a_time_budget_scales_every_run_alike_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    request, notes = Request("s", _study(POSITIONS, measurements=[]), "full"), []
    session = _session(note=notes.append)
    plan = planned(request, session, 7.5 + START_S)
    assert plan.scale == 0.5 and {t.tokens for t in plan.trials} == {32768}
    assert notes == ["every run is given 0.5 of the recipe's tokens, so that the plan fits 12 s"]
    first = run_study(request, tmp_path, session, 7.5 + START_S)
    slower = replace(MATERIALS, rate=lambda model, recipe: 1000.0)
    again = run_study(request, tmp_path, _session(materials=slower), 7.5)
    assert again.plan.scale == 0.5 and again.plan.digest == first.plan.digest


def test_a_model_whose_runs_are_done_is_not_timed(tmp_path: Path) -> None:
    request, asked = Request("s", _study(POSITIONS), "smoke"), []

    def rate(model: dict[str, Any], recipe: dict[str, Any]) -> float:
        asked.append(model["position"])
        return 32768.0

    session = _session(materials=replace(MATERIALS, rate=rate))
    crashing = replace(session, pool=replace(POOL, function="tests.study.toy_trials:crashing"))
    assert run_study(request, tmp_path, crashing).failed and asked == []
    plan, left = foreseen(request, tmp_path, session)
    assert [t.uses[0].arm for t in left] == ["rope", "alibi", "rope"]
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_table(plan, session.materials, 2, left))
    assert asked == ["rope", "alibi"] and "2 runs done" in console.file.getvalue()  # type: ignore[attr-defined]
    assert run_study(request, tmp_path, session).failed == () and len(asked) == 2
    assert foreseen(request, tmp_path, session)[1] == [] and len(foreseen(request, tmp_path / "new", session)[1]) == 5
    with pytest.raises(ValueError, match="another study's plan"):
        foreseen(replace(request, budget="full"), tmp_path, session)


def test_the_dry_run_counts_what_would_run() -> None:
    plan = make_plan(_tour(), MATERIALS, find=_find)
    rows = {(r["study"], r["arm"]): r for r in plan_rows(plan, MATERIALS, expected_seconds(plan, MATERIALS))}
    assert rows["kv", "base"] == {
        "study": "kv",
        "arm": "base",
        "seeds": 2,
        "runs": 0,
        "tokens": 2048,
        "params": 2048,
        "seconds": 0,
        "tuned": None,
    }
    measuring = measuring_seconds("latency") + measuring_seconds("extrapolation")
    assert rows["positions", "rope"]["seconds"] == pytest.approx(3 * (2048 / 32768 + 0.5 + measuring))
    assert rows["kv", "kv1"]["tuned"] == 40 and sum(r["runs"] for r in rows.values()) == len(plan.trials)
    console = Console(file=io.StringIO(), width=120)
    console.print(plan_table(plan, MATERIALS, 2))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    about = wall_seconds(expected_seconds(plan, MATERIALS), 2)
    assert f"11 runs, 22,528 tokens, 2 workers, about {about:.0f} s" in text and "rope" in text


def test_the_live_table_shows_what_runs() -> None:
    plan = make_plan(_tour(), MATERIALS, find=_find)
    console = Console(file=io.StringIO(), width=100)
    live = Live(plan.trials, console)
    first, second = plan.trials[:2]
    live.started(first, 1)
    live.progressed(first, {"fraction": 0.5, "loss_nats": 2.5})
    console.print(live.table())
    live.finished(first, None)
    live.started(second, 1)
    live.finished(second, "ValueError: [bold]x\nmore")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "50%" in text and "2.500" in text and "[1/11] positions/none seed 0: done" in text
    assert "[2/11] positions/rope seed 0: failed: ValueError: [bold]x\n" in text


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with Folder(tmp_path), pytest.raises(ValueError, match="in use"):
        run_study(_tour(), tmp_path, _session())
