"""A part that holds a rank's piece of its weights: the same module, the same lines, smaller tensors.

Between ranks nothing is exchanged here: for a mixer or an ffn the sum over all ranks of their outputs is the output of
the whole (column-parallel into a part, row-parallel out of it; Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from assay.ops.linear import linear
from assay.parts.base import Part
from assay.parts.linears.dense import DenseLinear


class Unbiased(DenseLinear):
    """A row-parallel map on every rank but the first, which adds the bias. It holds the bias as the others do."""

    def __init__(self, whole: DenseLinear) -> None:
        nn.Module.__init__(self)
        self.spec, self.site, self.name, self.by_piece = whole.spec, whole.site, whole.name, whole.by_piece
        self.register_parameter("weight", whole.weight)
        self.register_parameter("bias", whole.bias)

    def forward(self, x: Tensor, step: object) -> Tensor:
        return linear(x, self.weight)


@torch.no_grad()
def cut(part: Part, dims: Mapping[str, int], rank: int, ranks: int) -> None:
    """Leave of each named parameter piece `rank` of `ranks` equal ones along its dimension; in place, before an
    optimiser knows the parameters. ValueError for a dimension that is no multiple of `ranks`."""
    part.piece = (rank, ranks)
    for name, dim in dims.items():
        parameter = part.get_parameter(name)
        if parameter.shape[dim] % ranks:
            raise ValueError(f"{part.name}.{name}: {parameter.shape[dim]} is not dealt out to {ranks} ranks")
        parameter.data = parameter.data.chunk(ranks, dim)[rank].clone()
        row = name.removesuffix(".weight")
        if rank and dim == 1 and row != name and isinstance(part.get_submodule(row), DenseLinear):
            silence(part, row)


def silence(part: Part, name: str) -> None:
    """The row-parallel map at this dotted name adds no bias."""
    whole = part.get_submodule(name)
    if getattr(whole, "bias", None) is not None:
        place, _, last = name.rpartition(".")
        assert isinstance(whole, DenseLinear)
        part.get_submodule(place).add_module(last, Unbiased(whole))
