"""The plans through the one training loop: pieces of a batch, clipping, dropout, balance; alone and in products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from assay.cost.bill import Question, Sheet
from assay.cost.memory import score_values
from assay.cost.parallel import Share, Spread, share
from assay.ops.attend.call import native_bf16
from assay.spec.model import ModelSpec
from assay.spec.shard import stage_of
from assay.train.learner import LOGIT_BYTES
from assay.train.loop import train
from tests.train.parallel import staged, traffic
from tests.train.parallel.plans import Found, together
from tests.train.parallel.replicas import DELTA, GATED, GQA, MLA, MOE, made, mesh_of, steps, under
from tests.train.parallel.test_torchrun import launch, same_as_alone
from tests.train.small import MODEL, RECIPE, model, recipe

BIASED: dict[str, Any] = GQA | {"bias": "all", "qk_norm": {}}
SHARED: dict[str, Any] = MOE | {"shared": {"kind": "gated", "width": 8}}
MODELS: dict[str, ModelSpec] = {
    "dense": model(blocks={"b": {"mixer": BIASED, "ffn": GATED}}),
    "dropped": model(
        blocks={"b": {"mixer": BIASED, "ffn": GATED, "dropout": 0.1}}, embed={"kind": "token", "dropout": 0.1}
    ),
    "mla": model(blocks={"b": {"mixer": MLA, "ffn": GATED}}, head={"kind": "lm"}),
    "moe": model(blocks={"b": {"mixer": GQA, "ffn": SHARED}}),
    "hybrid": model(
        layers=3, pattern=["d", "d", "a"], blocks={"d": {"mixer": DELTA}, "a": {"mixer": GQA, "ffn": GATED}}
    ),
}
ALONE = [
    ({"tensor": 2}, ("dropped", "mla", "moe")),
    ({"expert": 2}, ("moe",)),
    ({"context": 2}, ("mla", "hybrid")),
    ({"pipeline": 2}, ("dense", "moe")),
]
PRODUCTS = [
    ({"data": 2, "tensor": 2}, ("dropped", "moe")),
    ({"shard": 2, "tensor": 2}, ("mla",)),
    ({"data": 2, "expert": 2}, ("moe",)),
    ({"shard": 2, "expert": 2}, ("moe",)),
    ({"tensor": 2, "expert": 2}, ("moe",)),
    ({"data": 2, "context": 2}, ("moe", "hybrid")),
    ({"tensor": 2, "context": 2}, ("dense", "hybrid")),
    ({"context": 4}, ("hybrid",)),
    ({"data": 2, "pipeline": 2}, ("dense", "moe")),
    ({"tensor": 2, "pipeline": 2}, ("dense", "hybrid")),
    ({"context": 2, "pipeline": 2}, ("hybrid",)),
    ({"expert": 2, "pipeline": 2}, ("moe",)),
]


def named(layout: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in layout.items())


def cases(layouts: list[tuple[dict[str, int], tuple[str, ...]]]) -> list[str]:
    return [f"{named(layout)}/{kind}" for layout, kinds in layouts for kind in kinds]


def everything(rank: int, processes: int) -> Found:
    found: Found = {}
    for layout, kinds in ALONE if processes == 2 else PRODUCTS:
        mesh = mesh_of(**layout)
        for kind in kinds:
            found |= under(f"{named(layout)}/{kind}", steps(made(MODELS[kind], mesh)))
    if processes == 2:
        return found | under("traffic", traffic.everything(processes)) | under("staged", staged.everything(processes))
    # What crosses processes inside of a block crosses again when the block is computed again.
    again = made(MODELS["hybrid"], mesh_of(tensor=2, context=2), recompute="full")
    return found | under("recomputed/hybrid", steps(again))


@pytest.fixture(scope="module")
def two() -> list[Found]:
    return together("tests.train.parallel.test_plans_loop:everything", 2)


@pytest.fixture(scope="module")
def four() -> list[Found]:
    return together("tests.train.parallel.test_plans_loop:everything", 4, 400.0)


def compare(found: Found, case: str) -> None:
    own = {name.removeprefix(f"{case}:"): t for name, t in found.items() if name.startswith(f"{case}:")}
    want = steps(made(MODELS[case.rpartition("/")[2]], None))
    assert own.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(own[name], t, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{case} {n}: {m}")


@pytest.mark.parametrize("case", cases(ALONE))
def test_two_processes_compute_what_one_computes(two: list[Found], case: str) -> None:
    compare(two[0], case)


TOKENS, D, WORD = 2 * 16, 16, 8  # of the batch and the models of `traffic`, of two layers


def test_tensor_ranks_exchange_four_times_a_layer(two: list[Found]) -> None:
    """Forward two a layer and backward two, each of all tokens; one for the embedding and one for the head's input; and
    for the loss three numbers a token. A ring of two sends each sum once."""
    (calls, sent), (all_calls, all_sent) = two[0]["traffic:tensor"].tolist()
    each = TOKENS * D * WORD
    assert (calls, sent) == (2 * 2 + 1 + 3, 5 * each + 3 * TOKENS * WORD)
    assert (all_calls - calls, all_sent - sent) == (2 * 2 + 1, 5 * each)
    told = share(Sheet(traffic.T5), Question(16, 2, "f32"), Spread({"tensor": 2})).sent["all_reduce"]
    assert told * WORD // 4 == all_sent - 3 * TOKENS * WORD  # all but the three numbers


def test_spread_tokens_cost_no_byte_more(two: list[Found]) -> None:
    """A gather and a scatter for each sum over ranks, and one gather either way at the ends of the stack."""
    sums, gathers, scatters, _, gathered, scattered = two[0]["traffic:sequence"][1].tolist()
    each = TOKENS * D * WORD // 2
    assert (sums, gathers, scatters) == (5, 4 * 2 + 2, 4 * 2)
    assert (gathered, scattered) == (gathers * each, scatters * each)


def test_experts_cost_two_exchanges_forward_of_the_rows_that_leave(two: list[Found]) -> None:
    """There what this rank's tokens chose elsewhere, back what others chose here."""
    for rank, other in ((0, 1), (1, 0)):
        (calls, sent), (all_calls, all_sent) = two[rank]["traffic:expert"].tolist()
        given = [two[r]["traffic:given"] for r in range(2)]
        rows = int(given[rank][:, other].sum() + given[other][:, rank].sum())
        assert (calls, all_calls) == (2 * 2, 4 * 2)
        assert (sent, all_sent) == (rows * D * WORD, 2 * rows * D * WORD)
    # The bill is for an even choice: half of what all chose leaves, the same number for each rank.
    told = share(Sheet(traffic.EXPERTS), Question(16, 2, "f32"), Spread({"expert": 2})).sent["all_to_all"]
    everything = sum(int(two[r]["traffic:given"].sum()) for r in range(2))
    assert told * WORD // 4 == 2 * everything // 2 * D * WORD


def test_context_gathers_keys_and_values_once_each_way(two: list[Found]) -> None:
    """Two key heads of four numbers, keys and values, of the half that is elsewhere; their gradients back."""
    each = TOKENS * (2 * 2 * 4) * WORD // 2
    assert two[0]["traffic:context"].tolist() == [2, 2, 2 * each, 2 * each]
    told = share(Sheet(traffic.KV), Question(16, 2, "f32"), Spread({"context": 2})).sent
    weights = share(Sheet(traffic.KV), Question(16, 2, "f32"), Spread({"data": 2})).sent["all_reduce"]
    assert told["all_gather"] * WORD // 4 == told["reduce_scatter"] * WORD // 4 == 2 * each
    assert told["all_reduce"] == weights and "send" not in told


def test_a_recurrence_sends_its_state_on_and_its_gradient_back(two: list[Found]) -> None:
    """Of two ranks the first sends forward, the second backward: once a layer each, and as many bytes as are billed."""
    told = share(Sheet(traffic.STATE), Question(16, 2, "f32"), Spread({"context": 2})).sent
    for rank in two:
        calls, sent = rank["traffic:state"].tolist()
        assert (calls, sent) == (2, told["send"] * WORD // 4) and sent > 0
    three = share(Sheet(traffic.STATE), Question(18, 2, "f32"), Spread({"context": 3})).sent
    assert three["send"] == 2 * told["send"]  # who stands in the middle


def test_a_stream_crosses_a_border_once_each_way(two: list[Found]) -> None:
    """Four micro-batches of 16 tokens; 1F1B holds as many of them as there are stages ahead."""
    for rank, held in zip(two, (2, 1), strict=True):
        assert rank["traffic:pipeline"].tolist() == [traffic.ROWS, traffic.ROWS * 16 * D * WORD, held]


def stage(two: list[Found], kind: str, precision: str, number: int) -> tuple[dict[str, int], Share]:
    """What was counted on a stage, and what the bill says of it."""
    place = f"staged:{kind}/{precision}/counted:"
    counted = {n.removeprefix(place): int(size) for n, size in two[number].items() if n.startswith(place)}
    ask = Question(staged.LENGTH, staged.ROWS, {"float32": "f32", "bfloat16": "bf16"}[precision])
    return counted, share(Sheet(staged.MODELS[kind]), ask, Spread({"pipeline": 2}, staged.PIECES)).stages[number]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("precision", staged.PRECISIONS)
@pytest.mark.parametrize("kind", staged.MODELS)
def test_stages_hold_and_send_what_the_bill_says(two: list[Found], kind: str, precision: str, number: int) -> None:
    """Weights and moments are float32, with copies in bfloat16 beside the weights; in the bill and in the check before
    a run. Half of a router's bias is not learned, and has no moments."""
    counted, told = stage(two, kind, precision, number)
    copies = counted["weights"] // 2 if precision == "bfloat16" else 0
    assert told.weights == told.gradients == counted["weights"] + copies
    assert told.sent["send"] == counted["send"]
    assert counted["needed"] == told.weights + told.gradients + told.moments
    assert told.moments - counted["moments"] == (8 * 4 if kind == "experts" else 0)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("precision", staged.PRECISIONS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_stages_keep_alive_what_the_bill_says(two: list[Found], kind: str, precision: str, number: int) -> None:
    """Two micro-batches on the first of two stages and one on the last, with their streams, and the gradients that the
    last sent back; beside them one set of copies, which a table that is read by row is not kept in."""
    spec, (counted, told) = staged.MODELS[kind], stage(two, kind, precision, number)
    parts = [one for one in Sheet(spec).parts if stage_of(one.site.name, spec, 2) == number]
    low = precision == "bfloat16"
    wide = 2 if low and native_bf16() else 4
    scores = wide * staged.ROWS // staged.PIECES * sum(score_values(one, staged.LENGTH, 0) for one in parts)
    copies = low * (counted["weights"] // 2 - (2 * spec.vocab * spec.d_model if number == 0 else 0))
    assert told.activations + told.held * scores + copies == pytest.approx(counted["alive"], rel=0.01)
    logits = LOGIT_BYTES * (staged.ROWS // staged.PIECES) * staged.LENGTH * spec.vocab if number else 0
    assert counted["saved"] - logits + copies == pytest.approx(counted["alive"], rel=0.01)


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "float32") for kind in staged.MODELS), ("untied", "bfloat16")]
)
def test_stages_learn_what_one_process_learns(two: list[Found], kind: str, precision: str) -> None:
    """A tied table's two gradients are summed in float32 by two stages, and in bfloat16 by one process."""
    want = steps(staged.one(kind, precision, None))
    for name, t in want.items():
        own = two[0][f"staged:{kind}/{precision}/steps:{name}"]
        torch.testing.assert_close(own, t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{kind} {n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*cases(PRODUCTS), "recomputed/hybrid"])
def test_four_processes_compute_what_one_computes(four: list[Found], case: str) -> None:
    compare(four[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [("tensor", "pipeline"), ("context", "pipeline")])
def test_a_run_from_the_command_line_and_its_save(tmp_path: Path, axes: tuple[str, str]) -> None:
    """Four processes; what they save together, one process takes up."""
    paths = tmp_path / "model.yaml", tmp_path / "recipe.yaml"
    for path, tree in zip(paths, (MODEL, RECIPE), strict=True):
        path.write_text(yaml.safe_dump(tree))
    words = ["train", str(paths[0]), "--recipe", str(paths[1]), "--out", str(tmp_path / "run"), "--device", "cpu"]
    changes = [f"recipe.parallel.{axis}=2" for axis in axes]
    found = launch(["-m", "assay", *words, "recipe.batch.accumulate=2", *changes], "--nproc-per-node", "4")
    assert found.returncode == 0, found.stderr
    same_as_alone(tmp_path / "run")
    assert train(model(), recipe(batch__accumulate=2), tmp_path / "run", resume=True).steps == 8
