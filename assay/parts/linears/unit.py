"""Linear maps of unit vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops.linear import linear
from assay.ops.packed import Packed
from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.linears.dense import Dense, DenseLinear
from assay.spec.base import Fan, Site


class Unit(Dense):
    """y = x W^T, each vector of W along the model's width of length 1. Loshchilov et al. 2024, arXiv 2410.01131.

    Section 2.6. Those are the rows of a map from the stream and the columns of one onto it. The paper normalises after
    each optimiser step; so does this, and the forward pass too, so that the function does not depend on the optimiser.
    """

    kind: Literal["unit"] = "unit"  # type: ignore[assignment]

    def build_fan(self, fan: Fan, site: Site, name: str) -> UnitLinear:
        if fan.bias and fan.split == 1:
            raise ValueError(f"{site.name}.{name}: a `unit` map onto the stream has no bias; accepted: dense with one")
        return UnitLinear(self, fan, site, name)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()


class UnitLinear(DenseLinear):
    """Parameters `weight` [out, in] and, when declared, `bias` [out]."""

    def __init__(self, spec: Any, fan: Fan, site: Site, name: str) -> None:
        super().__init__(spec, fan, site, name)
        self.along = 0 if fan.out else 1

    def unit(self) -> Tensor:
        return normalised(self.weight, self.along, self.name).to(self.weight.dtype)

    def forward(self, x: Tensor, step: Step | None) -> Tensor:
        return linear(x, self.unit(), self.bias)

    @torch.no_grad()
    def after(self, taps: Mapping[str, Tensor]) -> None:
        self.weight.copy_(self.unit())


def normalised(weight: Tensor, along: int, name: str) -> Tensor:
    """The weight with vectors of length 1 along a dimension, in float32 or better. ValueError for a packed one, whose
    codes were made of other lengths."""
    if isinstance(weight, Packed):
        raise ValueError(f"{name}: weights in 8 or 4 bits are not normalised; accepted dtypes: f32, bf16")
    return F.normalize(high(weight), dim=along)
