"""The bill of a step on many processes, against the formulas of the papers; `tests/train/parallel` measures it."""

from __future__ import annotations

import json

import pytest

from assay.cli.main import main
from assay.cost.bill import Question, Sheet
from assay.cost.parallel import Share, Spread, share
from assay.model.lm import weight_table
from assay.spec.load import load_model
from assay.train.parallel.schedule import order, simulate
from tests.train.test_encoder_decoder import SPEC as PAIRS

SPEC = load_model("gpt-11m")
COUNT = sum(w.numel for w in Sheet(SPEC).weights().values())


def of(pieces: int = 1, dtype: str = "f32", **sizes: int) -> Share:
    return share(Sheet(SPEC), Question(256, 8, dtype), Spread(sizes, pieces))


@pytest.mark.parametrize("n", [2, 3, 8])
def test_replicas_keep_all_and_sum_gradients_in_a_ring(n: int) -> None:
    """16 bytes a weight in float32 (Rajbhandari et al. 2020, section 3.1); 2 (n-1)/n of the gradients are sent."""
    found = of(data=n)
    assert found.weights + found.gradients + found.moments == 16 * COUNT and found.gathered == 0
    assert found.sent["all_reduce"] == pytest.approx(2 * (n - 1) / n * 4 * COUNT, abs=1)
    assert found.sent["all_gather"] == found.sent["reduce_scatter"] == 0


@pytest.mark.parametrize("n", [2, 4, 8])
def test_shards_keep_their_part_and_send_half_as_much_again(n: int) -> None:
    """ZeRO-3: 16/n bytes a weight, and gathers forward and backward beside one reduction (section 7.2.2): 3 P, less the
    second gather of what stands outside the blocks."""
    found, outside = of(shard=n), sum(w.numel for k, w in Sheet(SPEC).weights().items() if not k.startswith("blocks."))
    assert found.weights + found.gradients + found.moments == pytest.approx(16 * COUNT / n)
    assert sum(found.sent.values()) == pytest.approx((n - 1) / n * 4 * (3 * COUNT - outside), abs=3)
    assert found.gathered > 4 * outside


def test_hybrid_shards_sum_their_part_alone() -> None:
    found = of(data=4, shard=2)
    assert found.sent["all_reduce"] == pytest.approx(2 * 3 / 4 * 4 * COUNT / 2, abs=1)
    assert found.sent["reduce_scatter"] == of(shard=2).sent["reduce_scatter"]


def test_pieces_gather_again_and_reduce_once() -> None:
    one, two = of(shard=2), of(2, shard=2)
    assert two.sent["all_gather"] == 2 * one.sent["all_gather"]
    assert two.sent["reduce_scatter"] == one.sent["reduce_scatter"]
    assert two.gradients == 4 * COUNT and two.activations < one.activations


@pytest.mark.parametrize("pieces", [1, 2])
def test_offload_leaves_a_device_what_is_gathered_and_saved(pieces: int) -> None:
    """16/n bytes a weight go to the host; the gradients of pieces before the last are summed on the device, whole."""
    plain, found = (share(Sheet(SPEC), Question(256, 8, "f32"), Spread({"shard": 4}, pieces, way)) for way in (0, 1))
    assert found.host == pytest.approx(16 * COUNT / 4) and plain.host == 0 and plain.device == plain.total
    whole = 4 * COUNT if pieces > 1 else 0
    assert found.device == found.gathered + found.activations + whole
    assert found.sent == plain.sent


@pytest.mark.parametrize(("stages", "pieces"), [(p, m) for p in (2, 3, 6) for m in (1, 2, 4, 16)])
def test_a_pipeline_holds_and_waits_as_its_schedule_does(stages: int, pieces: int) -> None:
    found = of(pieces, pipeline=stages)
    run = simulate([order("1f1b", s, stages, pieces) for s in range(stages)])
    assert found.bubble == pytest.approx(run.bubble, abs=1e-12)
    assert tuple(one.held for one in found.stages) == run.held


@pytest.mark.parametrize("n", [2, 3])
def test_stages_have_their_layers_and_send_the_stream(n: int) -> None:
    """Each border once each way, 256 x 8 tokens; beside that a tied table's gradient between the first and the last."""
    found, table = of(4, pipeline=n), 4 * SPEC.vocab * SPEC.d_model
    assert sum(one.weights for one in found.stages) == 4 * COUNT + table
    assert [one.layers for one in found.stages] == [(6 * s // n, 6 * (s + 1) // n) for s in range(n)]
    stream = 256 * 8 * SPEC.d_model * 4
    ends = stream + table
    assert [one.sent["send"] for one in found.stages] == [ends, *[2 * stream] * (n - 2), ends]
    assert found.device == max(one.device for one in found.stages) < of(4).device
    half = of(4, data=2, pipeline=n)
    assert half.stages[0].sent["all_reduce"] == half.stages[0].weights
    assert half.stages[0].sent["send"] == stream // 2 + table


def test_an_encoder_is_held_too() -> None:
    weights = 4 * sum(w.numel for w in weight_table(PAIRS).values())
    assert share(Sheet(PAIRS), Question(16, 4, "f32", memory=16), Spread({"data": 2})).weights == weights


def test_a_model_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the model has no experts"):
        of(expert=2)
    assert main(["bill", "gpt-11m", "--parallel", "data=2,shards=2"]) == 2
    assert "--parallel: 'shards'; accepted: AXIS=NUMBER" in capsys.readouterr().err
    refused = {
        "pipeline=7": "parallel.pipeline: 7; the model has 6 layers: accepted: 1 to 6",
        "pipeline=2,shard=2": "shard: is not supported beside pipeline=2",
        "offload=true": "`shard` cuts, which is 1",
        "shard=2,offload=1": "'offload'; accepted",
        "shard=2,shard=4": "'shard=2,shard=4'; accepted: each axis once",
        "shard=²": "'shard'; accepted: AXIS=NUMBER",
    }
    for words, said in refused.items():
        assert main(["bill", "gpt-11m", "--parallel", words]) == 2
        assert said in capsys.readouterr().err


def test_the_verb_says_what_a_process_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bill", "gpt-11m", "--dtype", "f32", "--context", "256", "--batch", "8", "--parallel", "data=2,shard=2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["parallel"]
    assert found == of(data=2, shard=2).as_json() and found["pipeline"] is None
    assert main([*words, "--hardware", "a100"]) == 0
    said = capsys.readouterr().out
    assert "of one process" in said and "on the host" not in said
    assert main([*words[:-1], "data=2,shard=2,offload=true"]) == 0
    assert "on the host" in capsys.readouterr().out
    assert "of one process" in said and "One process's share of a training step fits in A100" in said
    staged = [*words[:-1], "data=2,pipeline=3", "--accumulate", "4"]
    assert main([*staged, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().split("\n")[-1])["parallel"]["pipeline"]
    assert found["bubble"] == pytest.approx(2 / 6)
    assert [(one["layers"], one["held"]) for one in found["stages"]] == [([0, 2], 3), ([2, 4], 2), ([4, 6], 1)]
    assert main(staged) == 0
    said = capsys.readouterr().out
    assert "stage" in said and "2-3" in said and "wait 33.3 % of a step" in said
