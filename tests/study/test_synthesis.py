"""What a synthesis chooses, on results with planted effects, and what it says about each choice."""

from collections.abc import Mapping
from typing import Any

import pytest

from assay.spec.result import Result
from assay.study.evidence import Evidence
from assay.study.synthesis import comparison_table, court_of, synthesise

SEEDS = (0.0, 0.02, -0.01, 0.01)
# arm -> loss, state bytes, params
Arms = Mapping[str, tuple[float, int, int]]
POSITIONS: Arms = {"none": (2.4, 512, 1000), "rope": (2.0, 512, 1000), "learned": (2.3, 512, 1100)}
KV: Arms = {"mha": (2.0, 512, 1000), "gqa": (2.001, 256, 1000), "mqa": (1.999, 128, 1000), "tiny": (2.5, 64, 900)}


def _results(study: str, arms: Arms, changes: Mapping[str, Mapping[str, Any]] | None = None) -> list[Result]:
    base = next(iter(arms))
    listed = [
        {"name": a, "title": a, "changes": dict((changes or {}).get(a, {} if a == base else {f"model.{study}": a}))}
        for a in arms
    ]
    values = {"metric": "loss_nats", "base_arm": base, "arms": listed, "title": study}
    out = [Result(kind="study", study=study, values=values)]
    for i, (arm, (loss, state, params)) in enumerate(arms.items()):
        for seed, shared in enumerate(SEEDS):
            own = 0.004 * ((seed * 3 + i * 5) % 7 - 3) / 3
            numbers = {"loss_nats": loss + shared + own, "state_bytes_per_token": state, "params_total": params}
            out.append(Result(kind="trial", study=study, arm=arm, seed=seed, values=numbers))
    return out


def _choices(results: list[Result], **constraints: float) -> dict[str, Any]:
    return {c.study: c for c in synthesise(results, constraints).choices}


def test_the_better_arm_is_taken_and_supported() -> None:
    found = _choices(_results("positions", POSITIONS))["positions"]
    assert found.arm == "rope" and found.supported and "better than none" in found.reason
    assert found.changes == {"model.positions": "rope"}


def test_a_tie_goes_to_fewer_state_bytes_and_says_so() -> None:
    found = _choices(_results("kv", KV))["kv"]
    assert found.arm == "mqa" and not found.supported
    assert "not distinguishable from" in found.reason and "fewer state bytes a token (128 against 256)" in found.reason


def test_equal_costs_go_to_the_one_with_fewer_changes() -> None:
    arms: Arms = {"base": (2.0, 512, 1000), "same": (2.0005, 512, 1000)}
    found = _choices(_results("s", arms))["s"]
    assert found.arm == "base" and not found.supported and "fewer changes" in found.reason


def test_the_base_arm_is_supported_where_all_others_are_worse() -> None:
    arms: Arms = {"base": (2.0, 512, 1000), "bad": (2.5, 64, 900)}
    found = _choices(_results("s", arms))["s"]
    assert found.arm == "base" and found.supported and "bad is worse" in found.reason


def test_a_constraint_forces_a_worse_arm_and_says_so() -> None:
    found = _choices(_results("kv", KV), state_bytes_per_token=100)["kv"]
    assert found.arm == "tiny" and not found.supported
    assert "worse than mha" in found.reason and "beyond the constraints" in found.reason
    with pytest.raises(ValueError, match="no tested arm of kv has state_bytes_per_token <= 10"):
        synthesise(_results("kv", KV), {"state_bytes_per_token": 10})


def test_an_arm_with_one_seed_is_never_taken() -> None:
    results = [r for r in _results("positions", POSITIONS) if r.arm != "rope" or (r.seed or 0) < 1]
    assert _choices(results)["positions"].arm == "learned"


def test_choices_are_merged_and_a_conflict_goes_to_the_supported() -> None:
    path = "model.blocks.*.ffn.width"
    tie = {"gqa": {"model.kv": 2, path: 1}, "mqa": {"model.kv": 1, path: 2}, "tiny": {"model.kv": 0}}
    results = [*_results("kv", KV, tie), *_results("positions", POSITIONS, {"rope": {"model.p": "rope", path: 3}})]
    found = synthesise(results, {})
    assert found.changes == {"model.kv": 1, path: 3, "model.p": "rope"}
    assert f"{path} is left to positions" in {c.study: c for c in found.choices}["kv"].reason


def test_the_merged_configuration_is_counted() -> None:
    results = [*_results("kv", KV), *_results("positions", POSITIONS)]

    def sizes(changes: Mapping[str, Any]) -> dict[str, float]:
        return {"params_total": {"mqa": 2000, "gqa": 1500}.get(changes.get("model.kv", ""), 1800)}

    found = {c.study: c.arm for c in synthesise(results, {"params_total": 1600}, sizes).choices}
    assert found == {"kv": "gqa", "positions": "rope"}
    with pytest.raises(ValueError, match="no combination"):
        synthesise(results, {"params_total": 1100}, sizes)
    with pytest.raises(ValueError, match="no stages"):
        synthesise([], {})


def test_the_table_compares_every_metric() -> None:
    arms: Arms = {"baseline": (2.0, 512, 1000), "chosen": (1.8, 128, 1000)}
    results = _results("synthesis", arms)
    rows = {r["metric"]: r for r in comparison_table(Evidence(results, "synthesis"), court_of(results[0]), "chosen")}
    assert list(rows) == ["loss_nats", "params_total", "state_bytes_per_token"]
    assert rows["loss_nats"]["verdict"] == "better" and rows["loss_nats"]["low"] < -0.2 + 0.01
    assert rows["state_bytes_per_token"] == {
        "metric": "state_bytes_per_token",
        "unit": "",
        "baseline": 512.0,
        "chosen": 128.0,
        "delta": -384.0,
        "low": -384.0,
        "high": -384.0,
        "verdict": "better",
    }
    assert rows["params_total"]["verdict"] == "not distinguishable"


def test_sizes_that_were_matched_and_rounded_break_no_tie() -> None:
    near: Arms = {"base": (2.0, 512, 1000), "rounded": (2.0005, 512, 990)}
    assert _choices(_results("s", near))["s"].arm == "base"
    fewer: Arms = {"base": (2.0, 512, 1000), "fewer": (2.0005, 512, 900)}
    assert _choices(_results("s", fewer))["s"].arm == "fewer"


def test_what_is_counted_is_constrained_as_a_whole_and_not_in_each_stage() -> None:
    deep: Arms = {"pre": (2.0, 2560, 1000), "post": (2.5, 2560, 1000)}
    results = [*_results("placement", deep), *_results("kv", KV)]

    def sizes(changes: Mapping[str, Any]) -> dict[str, float]:
        return {"state_bytes_per_token": 128 if changes.get("model.kv") == "mqa" else 512}

    found = {c.study: c.arm for c in synthesise(results, {"state_bytes_per_token": 200}, sizes).choices}
    assert found == {"placement": "pre", "kv": "mqa"}


def test_what_cannot_be_built_is_left_out_and_said() -> None:
    results = [*_results("positions", POSITIONS), *_results("kv", KV)]

    def sizes(changes: Mapping[str, Any]) -> dict[str, float]:
        if changes.get("model.kv") == "mqa":
            raise ValueError("kv_heads: 1 matches nothing")
        if len(changes) == 2 and changes.get("model.kv") == "gqa":
            raise ValueError("not with rope")
        return {}

    found = {c.study: c for c in synthesise(results, {}, sizes).choices}
    assert found["kv"].arm == "mha" and "mqa cannot be built here: kv_heads: 1 matches nothing." in found["kv"].reason

    def none(changes: Mapping[str, Any]) -> dict[str, float]:
        return {} if not changes else sizes({"model.kv": "mqa"})

    with pytest.raises(ValueError, match=r"no arm of kv can be taken: tiny .*matches nothing"):
        synthesise(_results("kv", KV), {"params_total": 950}, none)


def test_what_holds_others_is_set_first() -> None:
    outer = {"gqa": {"model.kv": 2}, "mqa": {"model.blocks": {}}, "tiny": {"model.kv": 0}}
    inner = {"rope": {"model.blocks.b.norm": 1}}
    found = synthesise([*_results("positions", POSITIONS, inner), *_results("kv", KV, outer)], {})
    assert list(found.changes) == ["model.blocks", "model.blocks.b.norm"]
