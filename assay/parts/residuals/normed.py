"""A residual whose stream is normalised itself, not only what the branches read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import NormSpec, PartSpec, ResidualSpec, Site


class Normed(ResidualSpec):
    """alpha * norm(h) + beta * f(norm(h)). MiniMax 2025, arXiv 2501.08313, section 2.2.2 (DeepNorm's weights, and the
    norm at the beginning of the stage)."""

    kind: Literal["normed"] = "normed"
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)
    alpha: float = 1.0
    beta: float = 1.0

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {"norm": (self.norm, site.child("norm"))}

    def build(self, site: Site) -> NormedResidual:
        return NormedResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls.model_validate({"norm": "layernorm", "alpha": 1.5, "beta": 0.5})


class NormedResidual(Residual):
    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        x = self.norm(h, step)
        return self.spec.alpha * x + self.spec.beta * f(x)


def reference(spec: Normed, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, D] in float64, one token at a time; the norm is written out for the two kinds that stand here."""
    norm: Any = spec.norm
    rows = []
    for row in h:
        row = row - row.mean() if norm.kind_name() == "layernorm" else row
        row = row / ((row * row).mean() + norm.eps) ** 0.5 * weights["norm.weight"]
        rows.append(row + weights.get("norm.bias", torch.zeros_like(row)))
    x = torch.stack(rows)
    return x * spec.alpha + f(x) * spec.beta
