"""What one step of each plan sends, by the mesh's counters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.spec.model import ModelSpec
from assay.train.evaluate import step_of
from assay.train.parallel import context, expert, pipeline, tensor
from assay.train.parallel.mesh import Mesh
from tests.train.parallel.plans import Found, batch, built, mesh_of, model

T5 = model(
    {"kind": "gqa", "heads": 4, "position": "t"},
    positions={"t": {"kind": "t5", "heads": 4, "buckets": 8, "max_distance": 12}},
)
KV = model({"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "rope"})
STATE = model({"kind": "gated_deltanet", "heads": 2, "head_dim": 8})
EXPERTS = model({"kind": "gqa", "heads": 2, "position": "rope"}, {"kind": "moe", "experts": 4, "width": 8})
ROWS = 4


def counted(mesh: Mesh, *kinds: str) -> list[int]:
    """Calls of each kind, then bytes of each."""
    return [n[kind] for n in (mesh.comm.calls, mesh.comm.sent) for kind in kinds]


def of_tensor(mesh: Mesh, *kinds: str) -> Tensor:
    """Forward, and in all; of a model without weights whose gradients are partial."""
    made, read = built(T5), batch(0)
    tensor.apply(made, mesh)
    mesh.comm.reset()
    loss: Any = made(step_of(read), targets=read.targets).loss
    forward = counted(mesh, *kinds)
    loss["objective"].backward()
    return torch.tensor([forward, counted(mesh, *kinds)])


def of_expert(mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Forward, and in all; and for each layer how many rows this rank's tokens give to each rank."""
    made, whole = built(EXPERTS), built(EXPERTS)
    expert.apply(made, mesh)
    piece = list(batch(0).split(1))[mesh.rank("expert")]
    mesh.comm.reset()
    loss: Any = made(step_of(piece), targets=piece.targets).loss
    forward = counted(mesh, "all_to_all")
    loss["objective"].backward()
    taps = whole(step_of(piece, frozenset(["*.router.choice"]))).taps
    chosen = [choice // 2 for name, choice in taps.items() if name.endswith("choice")]
    given = torch.tensor([[int((rank == owner).sum()) for rank in range(2)] for owner in chosen])
    return torch.tensor([forward, counted(mesh, "all_to_all")]), given


def of_context(mesh: Mesh, spec: ModelSpec, *kinds: str) -> Tensor:
    made, read = built(spec), batch(0)
    context.apply(made, mesh)
    mesh.comm.reset()
    made(step_of(read), targets=read.targets).loss["objective"].backward()
    return torch.tensor(counted(mesh, *kinds))


def of_pipeline(mesh: Mesh) -> Tensor:
    """In as many micro-batches as there are rows; and the most that were held."""
    made = built(KV)
    stage = pipeline.apply(made, mesh)
    pieces = list(batch(0, ROWS).split(1))
    mesh.comm.reset()
    stage.run(ROWS, lambda i: made(step_of(pieces[i]), targets=pieces[i].targets).loss["objective"])
    return torch.tensor([*counted(mesh, "send"), stage.most_held])


def everything(processes: int) -> Found:
    gone, given = of_expert(mesh_of(expert=processes))
    return {
        "tensor": of_tensor(mesh_of(tensor=processes), "all_reduce"),
        "sequence": of_tensor(mesh_of(tensor=processes, sequence=True), "all_reduce", "all_gather", "reduce_scatter"),
        "expert": gone,
        "given": given,
        "context": of_context(mesh_of(context=processes), KV, "all_gather", "reduce_scatter"),
        "state": of_context(mesh_of(context=processes), STATE, "send"),
        "pipeline": of_pipeline(mesh_of(pipeline=processes)),
    }
