"""Which weights a process holds pieces of, as its mesh and its model say, and what follows for gradients and saves."""

from __future__ import annotations

from torch import Tensor

from assay.parts.cut import piece
from assay.parts.cut import whole as whole_of
from assay.spec.model import ModelSpec
from assay.spec.shard import Cut, Deal, deal
from assay.train.parallel.mesh import Mesh


def deal_of(spec: ModelSpec, mesh: Mesh) -> Deal:
    """The deal of this mesh. ValueError, by name, for a part that it cannot be dealt out to."""
    return deal(spec, {axis: mesh.size(axis) for axis in ("tensor", "expert")}, mesh.spec.sequence)


def mine(whole: Tensor, cut: Cut | None, mesh: Mesh) -> Tensor:
    """This process's piece of a weight, or of a moment of it."""
    return whole if cut is None else piece(whole, cut, mesh.rank(cut.axis), mesh.size(cut.axis))


def joined(own: Tensor, cut: Cut | None, mesh: Mesh) -> Tensor:
    """The whole weight, from all processes' pieces: every process of the axis has to ask."""
    if cut is None or mesh.size(cut.axis) == 1:
        return own
    pieces = mesh.comm.all_gather(own.detach().contiguous(), mesh.group(cut.axis))
    return whole_of(pieces.unbind(0), cut)


def refuse_encoder(spec: ModelSpec, axis: str, ranks: int) -> None:
    """ValueError for a model with an encoder, where what it reads, or who reads what it says, is on several ranks."""
    if spec.encoder is not None:
        raise ValueError(f"encoder: {axis}={ranks} is not supported, since all layers read what it says; accepted: 1")


def refuse_dropout(spec: ModelSpec, axis: str, ranks: int) -> None:
    """ValueError, by name, for dropout: what is left out is drawn for whole rows and all layers, in their order."""
    why = f"{axis}={ranks} is not supported with dropout, which is drawn as one process draws it; accepted: 0"
    for site, part in spec.parts():
        if getattr(part, "dropout", 0.0) or getattr(getattr(part, "scores", None), "dropout", 0.0):
            raise ValueError(f"{site.name}: {part.slot[:-1]} {part.kind_name()}: {why}")
    for layer, stages in enumerate(spec.expand()):
        if any(stage.dropout for stage in stages):
            raise ValueError(f"blocks.{layer}: dropout: {why}")
