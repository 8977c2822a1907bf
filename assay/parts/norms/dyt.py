"""Dynamic tanh: in the place of a norm, without statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.base import Norm
from assay.spec.base import Init, NormSpec, Site, Weight


class DyT(NormSpec):
    """w tanh(a x) + b, a one learned number. Zhu et al. 2025, arXiv 2503.10622, eq. 3. alpha: where a starts."""

    kind: Literal["dyt"] = "dyt"
    alpha: float = Field(default=0.5, gt=0.0)
    bias: bool = True

    def own(self, site: Site) -> dict[str, Weight]:
        wanted = {"alpha": (1, self.alpha), "weight": (site.d_in, 1.0)} | (
            {"bias": (site.d_in, 0.0)} if self.bias else {}
        )
        return {name: Weight((size,), "vector", Init.constant(value)) for name, (size, value) in wanted.items()}

    def build(self, site: Site) -> DyTPart:
        return DyTPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(alpha=0.8, bias=False)


class DyTPart(Norm):
    """[..., D] -> [..., D]; in float32 or better, then the input's dtype."""

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        y = torch.tanh(high(x) * high(self.alpha)) * high(self.weight)
        return (y + high(self.bias) if self.spec.bias else y).to(x.dtype)


def reference(spec: DyT, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[N, D] in float64, one number at a time."""
    rows = []
    for row in x:
        e = [torch.exp(2 * weights["alpha"][0] * v) for v in row]
        y = torch.stack([(a - 1) / (a + 1) for a in e]) * weights["weight"]
        rows.append(y + weights["bias"] if spec.bias else y)
    return torch.stack(rows)
