"""A pipeline of two processes: what its stages learn together is what one process learns; activations are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.data.loader import Batch
from assay.model.lm import LM
from assay.train.evaluate import step_of
from assay.train.parallel import pipeline
from assay.train.parallel.pipeline import Stage
from assay.train.parallel.schedule import KINDS, Kind
from assay.train.parallel.spec import ParallelSpec
from tests.train.parallel.plans import Found, batch, built, mesh_of, model, together
from tests.train.test_encoder_decoder import SPEC as PAIRS

STEPS, ROWS, MICRO = 5, 4, 4
GQA = {"kind": "gqa", "heads": 2, "position": "rope"}
MOE = {"kind": "moe", "experts": 4, "width": 8, "router": {"kind": "topk", "balance": 0.1}}
MODELS = {
    "tied": model(
        GQA, head={"kind": "lm", "tie": True, "bias": True}, embed={"kind": "token", "norm": "rmsnorm"}, layers=3
    ),
    "learned": model({"kind": "gqa", "heads": 2}, positions={"p": {"kind": "learned"}}),
    "moe": model(GQA, MOE),
    "hybrid": model(
        GQA, blocks={"d": {"mixer": {"kind": "gated_deltanet", "heads": 2, "head_dim": 8}}, "a": {"mixer": GQA}},
        pattern=["d", "a"],
    ),
}  # fmt: skip


def steps(made: LM, stage: Stage | None, kind: Kind = "1f1b") -> tuple[Tensor, LM]:
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=1e-2), []
    for number in range(STEPS):
        read = batch(number, ROWS)
        pieces: list[Batch] = list(read.split(ROWS // MICRO))
        nll = torch.zeros((), dtype=torch.float64)

        def objective(i: int, pieces: list[Batch] = pieces, total: int = read.counted, nll: Tensor = nll) -> Tensor:
            out = made(step_of(pieces[i]), targets=pieces[i].targets)
            nll.add_(out.loss["nll"].detach())
            extra = [v * (pieces[i].counted / total) for name, v in out.taps.items() if ".loss." in name]
            return out.loss["objective"] / total + sum(extra)

        optimizer.zero_grad()
        if stage is None:
            for i in range(MICRO):
                objective(i).backward()
        else:
            stage.run(MICRO, objective, kind)
            stage.settle(made)
        optimizer.step()
        losses.append(nll)
    return torch.stack(losses), made


def cases(rank: int, processes: int) -> Found:
    found: Found = {}
    mesh = mesh_of(pipeline=processes)
    for name, spec in MODELS.items():
        for kind in KINDS:
            made = built(spec)
            stage = pipeline.apply(made, mesh)
            losses, made = steps(made, stage, kind)
            found[f"{name}/{kind}/losses"] = losses
            found[f"{name}/{kind}/held"] = torch.tensor(stage.most_held)
            found |= {f"{name}/{kind}/w/{n}": p.detach().clone() for n, p in made.named_parameters()}
    return found


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return together("tests.train.parallel.test_plans_pipeline:cases", 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_two_stages_learn_what_one_process_learns(found: list[Found], name: str, kind: Kind) -> None:
    losses, made = steps(built(MODELS[name]), None)
    place = f"{name}/{kind}"
    torch.testing.assert_close(found[1][f"{place}/losses"], losses, rtol=1e-10, atol=1e-10)
    for key, p in made.named_parameters():
        held = [rank[f"{place}/w/{key}"] for rank in found if f"{place}/w/{key}" in rank]
        assert len(held) == (2 if name == "tied" and key == "embed.weight" else 1), key
        for one in held:
            torch.testing.assert_close(one, p.detach(), rtol=1e-10, atol=1e-10, msg=f"{place} {key}")


@pytest.mark.slow
def test_one_forward_one_backward_holds_fewer(found: list[Found]) -> None:
    assert [int(rank["moe/1f1b/held"]) for rank in found] == [2, 1]
    assert [int(rank["moe/gpipe/held"]) for rank in found] == [MICRO, MICRO]


def spread(**more: bool | int) -> ParallelSpec:
    """Two stages."""
    return ParallelSpec(pipeline=2, **more)  # type: ignore[arg-type]


def test_what_reaches_over_a_border_is_named() -> None:
    shared = {"a": {"mixer": GQA | {"gives": "kv"}}, "b": {"mixer": GQA | {"takes": "kv"}}}
    with pytest.raises(ValueError, match=r"blocks.0.mixer: mixer gqa: pipeline=2 .* with `gives`"):
        pipeline.refuse(model(GQA, blocks=shared, pattern=["a", "b"]), spread())
    with pytest.raises(ValueError, match=r"blocks.1: like blocks.0: pipeline=2"):
        pipeline.refuse(
            model(GQA, blocks={"a": {"mixer": GQA}, "b": {"like": "blocks.0"}}, pattern=["a", "b"]), spread()
        )
    t5 = {"kind": "t5", "heads": 2, "buckets": 8, "max_distance": 12}
    with pytest.raises(ValueError, match=r"positions.t: position t5"):
        pipeline.refuse(model(GQA | {"position": "t"}, positions={"t": t5}), spread())
    with pytest.raises(ValueError, match=r"embed: embed token: pipeline=2 is not supported with dropout"):
        pipeline.refuse(model(GQA, embed={"kind": "token", "dropout": 0.1}), spread())
    with pytest.raises(ValueError, match=r"blocks.0.ffn: ffn per_layer: pipeline=2"):
        embeds = {"kind": "per_layer", "width": 4}
        blocks = {"a": {"mixer": GQA, "ffn": embeds | {"vocab": 32}}, "b": {"mixer": GQA, "ffn": embeds}}
        pipeline.refuse(model(GQA, blocks=blocks, pattern=["a", "b"]), spread())
    with pytest.raises(ValueError, match=r"recipe.parallel.shard: is not supported beside pipeline=2; accepted: 1"):
        pipeline.refuse(MODELS["moe"], spread(shard=2))
    with pytest.raises(ValueError, match=r"encoder: pipeline=2 is not supported, since all layers read what it says"):
        pipeline.refuse(PAIRS, spread())
