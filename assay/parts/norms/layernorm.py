"""Layer normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.base import Norm
from assay.spec.base import Init, NormSpec, Site, Weight


class LayerNorm(NormSpec):
    """(x - mean) / sqrt(var + eps) * w + b. Ba, Kiros and Hinton 2016, arXiv 1607.06450."""

    kind: Literal["layernorm"] = "layernorm"
    eps: float = 1e-5
    weight: bool = True
    bias: bool = True

    def check(self, site: Site) -> None:
        if self.bias and not self.weight:
            raise ValueError("`bias` without `weight` is not supported; accepted: both, weight alone, or neither")

    def own(self, site: Site) -> dict[str, Weight]:
        wanted = {"weight": 1.0} if self.weight else {}
        wanted |= {"bias": 0.0} if self.bias else {}
        return {name: Weight((site.d_in,), "vector", Init.constant(value)) for name, value in wanted.items()}

    def build(self, site: Site) -> LayerNormPart:
        return LayerNormPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(bias=False, eps=1e-2)
        yield cls(weight=False, bias=False)


class LayerNormPart(Norm):
    """[..., D] -> [..., D]; statistics and scale in float32 or better, then the input's dtype."""

    def mingles(self) -> str | None:
        return None

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        wide = high(x)
        w = self.weight.to(wide.dtype) if self.spec.weight else None
        b = self.bias.to(wide.dtype) if self.spec.bias else None
        return F.layer_norm(wide, x.shape[-1:], w, b, self.spec.eps).to(x.dtype)


def reference(spec: LayerNorm, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[N, D] in float64, one vector at a time."""
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        var = sum((v - mean) ** 2 for v in row) / len(row)
        rows.append((row - mean) / (var + spec.eps) ** 0.5 * weights.get("weight", 1.0) + weights.get("bias", 0.0))
    return torch.stack(rows)
