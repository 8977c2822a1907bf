"""A part that holds a rank's piece of its weights: the same module, the same lines, smaller tensors.

Between ranks nothing is exchanged here: for a mixer or an ffn the sum over all ranks of their outputs is the output of
the whole (column-parallel into a part, row-parallel out of it; Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.ops.linear import linear
from assay.parts.base import Part
from assay.parts.linears.dense import DenseLinear
from assay.spec.shard import Cut


class Unbiased(DenseLinear):
    """A row-parallel map on every rank but the first, which adds the bias. It holds the bias as the others do."""

    def __init__(self, whole: DenseLinear) -> None:
        nn.Module.__init__(self)
        self.spec, self.site, self.name, self.by_piece = whole.spec, whole.site, whole.name, whole.by_piece
        self.register_parameter("weight", whole.weight)
        self.register_parameter("bias", whole.bias)

    def forward(self, x: Tensor, step: object) -> Tensor:
        return linear(x, self.weight)


def piece(whole: Tensor, how: Cut, rank: int, ranks: int) -> Tensor:
    """What a rank holds of a weight."""
    place, count = how.place(rank, ranks)
    if not how.sections:
        return whole.chunk(count, how.dim)[place]
    return torch.cat([part.chunk(count, how.dim)[place] for part in whole.split(how.sections, how.dim)], how.dim)


def whole(pieces: Sequence[Tensor], how: Cut) -> Tensor:
    """The weight, from what all ranks hold of it, in their order."""
    apart = pieces[:: how.copies]
    if not how.sections:
        return torch.cat(list(apart), how.dim)
    sizes = [size // len(apart) for size in how.sections]
    sections = zip(*(p.split(sizes, how.dim) for p in apart), strict=True)
    return torch.cat([part for parts in sections for part in parts], how.dim)


@torch.no_grad()
def cut(part: Part, cuts: Mapping[str, Cut], rank: int, ranks: int) -> None:
    """Leave of each named parameter what this rank holds; in place, before an optimiser knows the parameters.
    ValueError for a dimension, or a section of it, that the ranks do not divide."""
    part.piece = (rank, ranks)
    for name, how in cuts.items():
        parameter = part.get_parameter(name)
        for size in how.sections or (parameter.shape[how.dim],):
            if size % how.place(rank, ranks)[1]:
                raise ValueError(f"{part.name}.{name}: {size} is not dealt out to {ranks} ranks")
        parameter.data = piece(parameter.data, how, rank, ranks).clone()
        row = name.removesuffix(".weight")
        if rank and how.dim == 1 and row != name and isinstance(part.get_submodule(row), DenseLinear):
            silence(part, row)


def silence(part: Part, name: str) -> None:
    """The row-parallel map at this dotted name adds no bias."""
    whole = part.get_submodule(name)
    if getattr(whole, "bias", None) is not None:
        place, _, last = name.rpartition(".")
        assert isinstance(whole, DenseLinear)
        part.get_submodule(place).add_module(last, Unbiased(whole))
