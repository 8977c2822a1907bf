"""Five optimiser steps by the learner on a mesh, or alone: what the tests of replicas and shards compare."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from assay.data.loader import Batch
from assay.model import lm
from assay.spec.model import ModelSpec
from assay.train import learner
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.spec import ParallelSpec
from assay.train.recipe import Recipe
from tests.train.parallel.plans import Found
from tests.train.small import model, recipe

STEPS = 5
GQA: dict[str, Any] = {"kind": "gqa", "heads": 2, "position": "rope"}
MLA: dict[str, Any] = {"kind": "mla", "heads": 2, "kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "value_dim": 4,
                       "position": "rope"}  # fmt: skip
MOE: dict[str, Any] = {"kind": "moe", "experts": 4, "width": 8, "router": {
    "kind": "topk", "balance": 0.5, "z": 0.1, "select_bias": {"rate": 0.01}}}  # fmt: skip
GATED: dict[str, Any] = {"kind": "gated", "width": 24}
DELTA: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2, "head_dim": 8}
DROPPED: dict[str, Any] = {"mixer": GQA | {"scores": {"dropout": 0.2}}, "ffn": GATED, "dropout": 0.1}
MODELS: dict[str, ModelSpec] = {
    "dense": model(blocks={"b": DROPPED}, embed={"kind": "token", "dropout": 0.1}),
    "mla": model(blocks={"b": {"mixer": MLA, "ffn": GATED}}, head={"kind": "lm"}),
    "moe": model(blocks={"b": {"mixer": GQA, "ffn": MOE}}),
    "hybrid": model(
        layers=3,
        pattern=["d", "d", "a"],
        blocks={"d": {"mixer": DELTA}, "a": {"mixer": GQA, "ffn": GATED}},
    ),
    "tied": model(layers=3, pattern=["b", "b", "c"], blocks={
        "b": {"mixer": GQA, "ffn": GATED}, "c": {"like": "blocks.0"}}),
}  # fmt: skip


def how(**changes: Any) -> Recipe:
    """Packed documents; pieces of three rows, which two processes cannot share evenly, and a norm that is clipped."""
    return recipe(**{"batch__rows": 6, "batch__accumulate": 2, "clip": 0.1, "optimizer__weight_decay": 0.1} | changes)


def double(*args: Any) -> lm.LM:
    """A new model in float64: recipes keep weights in float32, where sums in another order differ at once."""
    return lm.build(*args).double()


def made(spec: ModelSpec, mesh: Mesh | None, dtype: torch.dtype = torch.float64, **changes: Any) -> Learner:
    with mock.patch.object(learner, "build", double if dtype == torch.float64 else lm.build):
        one = how(**changes)
        torch.manual_seed(one.seed)
        return Learner(spec, one, dataset(one), torch.device("cpu"), False, mesh)


def steps(one: Learner, count: int = STEPS, first: int = 0) -> Found:
    """Losses and norms of the steps, then the whole weights and the optimiser's state."""
    taken = [one.step(number, 8) for number in range(first, first + count)]
    state = {f"state/{name}": t for name, t in one.state()[0].items() if not name.startswith("rng")}
    found: dict[str, Tensor] = {
        "loss": torch.stack([t.loss for t in taken]),
        "norm": torch.stack([t.norm for t in taken]),
    }
    return found | {f"weight/{n}": w.clone() for n, w in one.team.weights().items()} | state


def under(prefix: str, found: Found) -> Found:
    return {f"{prefix}:{name}": t for name, t in found.items()}


def mesh_of(**sizes: int) -> Mesh:
    return Mesh.of(ParallelSpec(**sizes))  # type: ignore[arg-type]


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.inputs.view(batch.grid).tolist()]


def everything(rank: int, processes: int) -> Found:
    """All cases in one group of processes: each layout with each model."""
    found: Found = {}
    layouts = {2: [{"data": 2}, {"shard": 2}], 4: [{"data": 4}, {"data": 2, "shard": 2}]}[processes]
    for sizes in layouts:
        mesh, name = mesh_of(**sizes), "-".join(f"{k}{v}" for k, v in sizes.items())
        for kind, spec in MODELS.items():
            found |= under(f"{name}/{kind}", steps(made(spec, mesh)))
        found |= under(f"{name}/float32", steps(made(MODELS["moe"], mesh, torch.float32)))
    return found
