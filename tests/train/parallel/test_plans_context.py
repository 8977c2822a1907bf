"""Context parallelism on two processes: packed documents that cross the border between ranks train as on one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.model.lm import LM
from assay.ops.sees import Sees
from assay.train.evaluate import step_of
from assay.train.memory import SavedForBackward
from assay.train.parallel import context
from assay.train.parallel.context import Columns
from assay.train.parallel.mesh import Mesh
from tests.train.parallel.plans import Found, alike, batch, built, mesh_of, model, together
from tests.train.test_encoder_decoder import SPEC as PAIRS

STEPS = 3
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "rope", "scores": {"softcap": 2.0, "sink": True}}
MLA = {"kind": "mla", "heads": 2, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "position": "rope"}
MIXERS = {
    "gqa": GQA,
    "window": GQA | {"sees": {"window": 5}},
    "mla": MLA,
    "blocks": GQA | {"scores": {"blocks": {"size": 3, "keep": 2}}},
    "nsa": {
        "kind": "nsa",
        "heads": 4,
        "kv_heads": 2,
        "position": "rope",
        "window": 3,
        "size": 2,
        "keep": 3,
        "compress": {"size": 2, "stride": 1},
        "initial": 0,
        "local": 1,
    },
    "mamba2": {"kind": "mamba2", "heads": 2, "head_dim": 8, "state_size": 4, "chunk": 4},
    "gated_deltanet": {"kind": "gated_deltanet", "heads": 2, "head_dim": 8, "chunk": 4},
    "rwkv7": {"kind": "rwkv7", "heads": 2, "head_dim": 8},
    "rglru": {"kind": "rglru", "heads": 2},
    "mamba": {"kind": "mamba"},
}
MODELS = {name: model(mixer) for name, mixer in MIXERS.items()} | {
    "hybrid": model(GQA, blocks={"a": {"mixer": GQA}, "d": {"mixer": MIXERS["gated_deltanet"]}}, pattern=["d", "a"]),
    "biased": model(
        {"kind": "gqa", "heads": 4, "position": "t"},
        positions={"t": {"kind": "t5", "heads": 4, "buckets": 8, "max_distance": 12}},
    ),
    "learned": model(
        {"kind": "gqa", "heads": 2}, positions={"p": {"kind": "learned"}}, head={"kind": "lm", "tie": True}
    ),
}


def steps(made: LM, mesh: Mesh | None) -> tuple[Tensor, LM]:
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=1e-2), []
    for number in range(STEPS):
        read = batch(number)
        out = made(step_of(read), targets=read.targets)
        optimizer.zero_grad()
        (out.loss["objective"] / read.counted).backward()
        nll = out.loss["nll"].detach()
        if mesh is not None:
            mesh.comm.all_reduce(nll, mesh.group("context"))
            for p in made.parameters():
                mesh.comm.all_reduce(p.grad, mesh.group("context"))
        optimizer.step()
        losses.append(nll)
    return torch.stack(losses), made


def cases(rank: int, processes: int) -> Found:
    found: Found = {}
    mesh = mesh_of(context=processes)
    for name, spec in MODELS.items():
        made = built(spec)
        context.apply(made, mesh)
        with torch.no_grad():
            found[f"{name}/logits"] = made(step_of(batch(9))).logits
        losses, made = steps(made, mesh)
        found[f"{name}/losses"] = losses
        found |= {f"{name}/w/{n}": p.detach() for n, p in made.named_parameters()}
    return found


RINGS = {2: ("gqa", "window", "biased"), 4: ("gqa", "window", "mla", "blocks", "hybrid", "learned", "biased")}
"""By the number of ranks; two run every day."""


def rings(rank: int, processes: int) -> Found:
    """The same with `ring`, and what one call of a layer sends."""
    found: Found = {}
    mesh = mesh_of(context=processes, ring=True)
    for name in RINGS[processes]:
        made = built(MODELS[name])
        context.apply(made, mesh)
        losses, made = steps(made, mesh)
        found |= {f"{name}/losses": losses} | {f"{name}/w/{n}": p.detach() for n, p in made.named_parameters()}
    found["sent"] = torch.tensor(sent_by_a_step(mesh))
    found["saved"] = torch.tensor([saved_by_a_step(mesh), saved_by_a_step(mesh_of(context=processes))])
    return found


def saved_by_a_step(mesh: Mesh) -> int:
    """Bytes kept for the backward pass."""
    made, read = built(MODELS["window"]), batch(0)
    context.apply(made, mesh)
    with SavedForBackward(made) as saved:
        made(step_of(read), targets=read.targets)
    return saved.bytes


def sent_by_a_step(mesh: Mesh) -> list[int]:
    """Forward, and in all; bytes that were gathered or summed."""
    made, read = built(MODELS["window"]), batch(0)
    context.apply(made, mesh)
    mesh.comm.reset()
    loss = made(step_of(read), targets=read.targets).loss["objective"]
    forward = mesh.comm.sent["send"]
    loss.backward()
    return [forward, mesh.comm.sent["send"], mesh.comm.sent["all_gather"] + mesh.comm.sent["reduce_scatter"]]


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return together("tests.train.parallel.test_plans_context:cases", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_learn_what_one_process_learns(found: list[Found], name: str) -> None:
    made = built(MODELS[name])
    logits = made(step_of(batch(9))).logits.detach()
    losses, made = steps(made, None)
    # A recurrence's state is declared in float32, and begins so on one process, from zero.
    for rank in found:
        torch.testing.assert_close(rank[f"{name}/logits"], logits, rtol=1e-10, atol=1e-10)
    alike(found, name, losses, made, 1e-9)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def rounds(request: pytest.FixtureRequest) -> list[Found]:
    return together("tests.train.parallel.test_plans_context:rings", request.param)


def test_a_ring_learns_what_one_process_learns(rounds: list[Found]) -> None:
    for name in RINGS[len(rounds)]:
        losses, made = steps(built(MODELS[name]), None)
        alike(rounds, name, losses, made, 1e-9)


def test_a_ring_sends_a_block_a_round_and_its_gradient_home(rounds: list[Found]) -> None:
    """Two rows of 16 / n tokens, two key heads of 4 for keys and for values, in float64; two layers."""
    n = len(rounds)
    block = 2 * (16 // n) * 2 * (2 * 4) * 8
    for rank in rounds:
        assert rank["sent"].tolist() == [2 * (n - 1) * block, 2 * (3 * n - 2) * block, 0]


def test_a_ring_keeps_no_scores_and_no_others_keys(rounds: list[Found]) -> None:
    """At least, of two layers, the square of scores of two rows and four heads."""
    n = len(rounds)
    scores = 2 * 2 * 4 * (16 // n) * 16 * 8
    for rank in rounds:
        ring, gathered = rank["saved"].tolist()
        assert ring < gathered - scores


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_folded_columns_cost_every_rank_the_same(ranks: int) -> None:
    length = 4 * ranks
    seen = [int((row + 1).sum()) for row in Columns.of(length, ranks, True).places]
    assert set(seen) == {Sees().pairs(length, 0) // ranks}
    assert sorted(Columns.of(length, ranks, True).places.flatten().tolist()) == list(range(length))
    plain = [int((row + 1).sum()) for row in Columns.of(length, ranks, False).places]
    assert max(plain) > max(seen)


def test_what_cannot_be_spread_is_named() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.mixer: mixer gqa: context=2 .*later tokens.*; accepted: context=1"):
        context.refuse(model(GQA | {"sees": {"causal": False}}), 2)
    with pytest.raises(ValueError, match="encoder: context=2 is not supported, since all layers read what it says"):
        context.refuse(PAIRS, 2)
    with pytest.raises(ValueError, match="with dropout"):
        context.refuse(model(GQA | {"scores": {"dropout": 0.1}}), 2)
    with pytest.raises(ValueError, match=r"recipe.batch.length: 18; with parallel.context=4 a multiple of 8"):
        Columns.of(18, 4, True)
