"""What stages of a pipeline hold and send in a step of the learner, counted while it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from assay.spec.model import ModelSpec
from assay.train.learner import Learner
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.replicas import local
from tests.train.parallel.plans import Found
from tests.train.parallel.replicas import GQA, MOE, made, mesh_of, steps, under
from tests.train.small import model

ROWS, LENGTH, PIECES = 12, 32, 6
DENSE: dict[str, Any] = {"mixer": GQA | {"heads": 8}, "ffn": {"kind": "gated", "width": 160}}
MODELS: dict[str, ModelSpec] = {
    "tied": model(d_model=64, layers=5, blocks={"b": DENSE}),
    "untied": model(d_model=64, layers=5, blocks={"b": DENSE}, head={"kind": "lm", "tie": False, "bias": True}),
    "streams": model(d_model=64, layers=2, blocks={"b": DENSE | {"residual": {"kind": "hyper", "streams": 3}}}),
    "experts": model(d_model=64, layers=2, blocks={"b": {"mixer": GQA, "ffn": MOE}}),
}
PRECISIONS = ("float32", "bfloat16")
WHOLE = {"data__documents": 1, "data__document_bytes": 1 << 14, "data__valid_one_in": 0, "evaluation__tokens": 0}


def one(kind: str, precision: str, mesh: Mesh | None) -> Learner:
    """Rows of one running text, which need no mask, in pieces of two rows."""
    changes = {"batch__rows": ROWS, "batch__length": LENGTH, "batch__accumulate": PIECES, "precision": precision}
    return made(MODELS[kind], mesh, torch.float32, **changes, **WHOLE)


class Alive:
    """The most bytes that were there between two passes of a step, of all that autograd saved and that was sent."""

    def __init__(self, learner: Learner) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in learner.model.parameters()}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._learner, self.most = learner, 0

    def saw(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._seen[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return x.detach()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Looks after each forward pass, when most is held."""
        comm, learner = self._learner.mesh.comm, self._learner
        send, objective = comm.send, learner._objective

        def forward(*args: Any) -> Tensor:
            found = objective(*args)
            self.most = max(self.most, sum(size for ref, size in self._seen.values() if not ref.expired()))
            return found

        hooks = torch.autograd.graph.saved_tensors_hooks(self.saw, lambda x: x)
        with (
            hooks,
            mock.patch.object(comm, "send", lambda x, *args, **more: send(self.saw(x), *args, **more)),
            mock.patch.object(learner, "_objective", forward),
        ):
            yield


def counted(mesh: Mesh, kind: str, precision: str) -> Found:
    """Of this process: bytes of its weights and moments, what it sent, and what was alive at most; and what the check
    before a run says that it will save."""
    own = one(kind, precision, mesh)
    own.step(0, 8)
    need = own.need()
    mesh.comm.reset()
    alive = Alive(own)
    with alive.counting():
        own.step(1, 8)
    moments = sum(local(t).nbytes for s in own.optimizer.state.values() for t in s.values() if t.dim())
    found = {
        "weights": sum(p.nbytes for p in own.model.parameters()),
        "moments": moments,
        "alive": alive.most,
        "send": mesh.comm.sent["send"],
        "needed": need.weights + need.gradients + need.moments,
        "saved": need.activations,
    }
    return {name: torch.tensor(size) for name, size in found.items()}


def everything(processes: int) -> Found:
    found: Found = {}
    mesh = mesh_of(pipeline=processes)
    for kind in MODELS:
        for precision in PRECISIONS:
            place = f"{kind}/{precision}"
            found |= under(f"{place}/counted", counted(mesh, kind, precision))
            found |= under(f"{place}/steps", steps(one(kind, precision, mesh)))
    return found
