"""Tensor parallelism on two processes: losses and weights of five steps are those of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.model.lm import LM
from assay.parts.heads.lm import LossOptions
from assay.spec.model import ModelSpec
from assay.train.evaluate import step_of
from assay.train.parallel import plan, tensor
from assay.train.parallel.mesh import Mesh
from tests.train.parallel.plans import Found, alike, batch, built, mesh_of, model, settle, together

STEPS = 5
QK = {
    "kind": "gqa",
    "heads": 4,
    "kv_heads": 2,
    "position": "rope",
    "bias": "all",
    "qk_norm": {},
    "scores": {"sink": True},
}
MLA = {"kind": "mla", "heads": 2, "kv_rank": 6, "q_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4,
       "position": "rope", "bias": True}  # fmt: skip
DELTA = {"kind": "gated_deltanet", "heads": 2, "head_dim": 8}
MAMBA2 = {"kind": "mamba2", "heads": 4, "head_dim": 4, "state_size": 3, "groups": 2, "bias": True}
MOE = {"kind": "moe", "experts": 4, "width": 8, "router": {"kind": "topk", "balance": 0.1},
       "shared": {"kind": "gated", "width": 8, "share": True}}  # fmt: skip
MODELS: dict[str, ModelSpec] = {
    "dense": model(QK, {"kind": "dense", "width": 24, "bias": True}, head={"kind": "lm", "tie": True, "bias": True}),
    "mla": model(MLA, embed={"kind": "token", "scale": 2.0, "norm": "rmsnorm"}),
    "moe": model(QK, MOE, positions={"rope": {"kind": "rope"}}),
    "hybrid": model(
        QK, blocks={"a": {"mixer": QK, "ffn": {"kind": "gated", "width": 24}}, "d": {"mixer": DELTA}}, layers=3,
        pattern=["d", "a"],
    ),
    "state_space": model(
        QK, blocks={"a": {"mixer": MAMBA2, "conv": {"kind": "conv", "bias": True, "act": "silu"}},
                    "s": {"mixer": {"kind": "s4d", "modes": 3, "gate": False}}}, pattern=["a", "s"],
    ),
    "t5": model(QK | {"position": "t"}, positions={"t": {"kind": "t5", "heads": 4, "buckets": 8, "max_distance": 12}}),
}  # fmt: skip
SPREAD = ("dense", "mla", "hybrid")
OPTIONS = LossOptions(smoothing=0.1, z=1e-2, piece=8 * 32)  # eight rows of logits at once


def steps(made: LM, mesh: Mesh | None) -> tuple[Tensor, LM]:
    """Losses of five steps of AdamW without clipping, and the trained model."""
    deal = None if mesh is None else plan.deal_of(made.spec, mesh)
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=1e-2), []
    for number in range(STEPS):
        read = batch(number)
        out = made(step_of(read), targets=read.targets, options=OPTIONS)
        assert out.loss is not None
        extra = [v for name, v in out.taps.items() if ".loss." in name]
        total = out.loss["objective"] / read.counted + sum(extra)
        optimizer.zero_grad()
        total.backward()
        if mesh is not None and deal is not None:
            settle(made, deal, mesh)
        optimizer.step()
        losses.append(out.loss["nll"].detach())
    return torch.stack(losses), made


def cases(rank: int, processes: int) -> Found:
    """Every model cut in so many pieces; weights joined again; bytes and calls of a step."""
    found: Found = {}
    mesh = mesh_of(tensor=processes)
    for name, spec in MODELS.items():
        made = built(spec)
        tensor.apply(made, mesh)
        found[f"{name}/logits"] = made(step_of(batch(9))).logits.detach()
        losses, made = steps(made, mesh)
        cuts = plan.deal_of(spec, mesh).cuts
        found[f"{name}/losses"] = losses
        found[f"{name}/held"] = torch.tensor(sum(p.numel() for p in made.parameters()))
        found |= {f"{name}/w/{n}": plan.joined(p.detach(), cuts.get(n), mesh) for n, p in made.named_parameters()}
    return found | in_sequence(processes)


def in_sequence(processes: int) -> Found:
    """The same with the tokens between the parts spread; and what one step sends."""
    found: Found = {}
    mesh = mesh_of(tensor=processes, sequence=True)
    for name in SPREAD:
        made = built(MODELS[name])
        tensor.apply(made, mesh)
        losses, made = steps(made, mesh)
        cuts = plan.deal_of(made.spec, mesh).cuts
        found[f"{name}/sequence/losses"] = losses
        found |= {
            f"{name}/sequence/w/{n}": plan.joined(p.detach(), cuts.get(n), mesh) for n, p in made.named_parameters()
        }
    return found


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return together("tests.train.parallel.test_plans_tensor:cases", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_learn_what_one_process_learns(found: list[Found], name: str) -> None:
    made = built(MODELS[name])
    logits = made(step_of(batch(9))).logits.detach()
    losses, made = steps(made, None)
    for rank in found:
        torch.testing.assert_close(rank[f"{name}/logits"], logits, rtol=1e-10, atol=1e-10)
    alike(found, name, losses, made)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_tokens_spread_between_the_parts_change_nothing(found: list[Found], name: str) -> None:
    losses, made = steps(built(MODELS[name]), None)
    alike(found, f"{name}/sequence", losses, made)


def test_what_needs_all_tokens_between_parts_is_named() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.ffn: ffn moe: parallel.sequence is not supported"):
        tensor.refuse_sequence(MODELS["moe"], 2)
    dropped = model(QK, blocks={"b": {"mixer": QK, "dropout": 0.1}})
    with pytest.raises(ValueError, match=r"blocks.0: dropout.*parallel.sequence is not supported"):
        tensor.refuse_sequence(dropped, 2)


@pytest.mark.slow
def test_a_rank_holds_its_share(found: list[Found]) -> None:
    whole = sum(p.numel() for p in built(MODELS["dense"]).parameters())
    assert int(found[0]["dense/held"]) < 0.56 * whole
