"""Expert parallelism on two processes: each reads its own rows; what they learn is what one process learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.model.lm import LM
from assay.train.evaluate import step_of
from assay.train.parallel import expert, plan
from assay.train.parallel.mesh import Mesh
from tests.train.parallel.plans import Found, alike, batch, built, mesh_of, model, together

STEPS = 5
GQA = {"kind": "gqa", "heads": 2, "position": "rope"}
ROUTER = {"kind": "topk", "balance": 0.0, "k": 2}
MODELS = {
    "gated": model(GQA, {"kind": "moe", "experts": 4, "width": 8, "bias": True, "router": ROUTER}),
    "shared": model(
        GQA,
        {"kind": "moe", "experts": 6, "width": 4, "gated": False, "act": "relu2", "latent": 12, "input_scaled": True,
         "router": ROUTER | {"score": "sigmoid", "k": 1}, "shared": {"kind": "dense", "width": 8}},
    ),
}  # fmt: skip


def steps(made: LM, mesh: Mesh | None) -> tuple[Tensor, LM]:
    optimizer, losses = torch.optim.AdamW(made.parameters(), lr=1e-2), []
    cuts = {} if mesh is None else plan.deal_of(made.spec, mesh).cuts
    for number in range(STEPS):
        read = batch(number)
        piece = read if mesh is None else list(read.split(1))[mesh.rank("expert")]
        out = made(step_of(piece), targets=piece.targets)
        optimizer.zero_grad()
        (out.loss["objective"] / read.counted).backward()
        nll = out.loss["nll"].detach()
        if mesh is not None:
            mesh.comm.all_reduce(nll, mesh.group("expert"))
            for name, p in made.named_parameters():
                if name not in cuts:
                    mesh.comm.all_reduce(p.grad, mesh.group("expert"))
        optimizer.step()
        losses.append(nll)
    return torch.stack(losses), made


def cases(rank: int, processes: int) -> Found:
    found: Found = {}
    mesh = mesh_of(expert=processes)
    for name, spec in MODELS.items():
        made = built(spec)
        expert.apply(made, mesh)
        losses, made = steps(made, mesh)
        cuts = plan.deal_of(spec, mesh).cuts
        found[f"{name}/losses"] = losses
        found |= {f"{name}/w/{n}": plan.joined(p.detach(), cuts.get(n), mesh) for n, p in made.named_parameters()}
    return found


@pytest.fixture(scope="module")
def found() -> list[Found]:
    return together("tests.train.parallel.test_plans_expert:cases", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_experts_on_two_ranks_learn_what_they_learn_on_one(found: list[Found], name: str) -> None:
    losses, made = steps(built(MODELS[name]), None)
    alike(found, name, losses, made)
