"""The residual of Gemma 4's layers: the branches normed together, and the stream scaled by a number a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import Init, NormSpec, PartSpec, ResidualSpec, Site, Weight


class Scaled(ResidualSpec):
    """scalar * (h + norm(f(h))). Gemma team 2026, Gemma 4.

    output_norm: on the sum of the stage's branches. scalar: a learned number that multiplies the whole stream.
    """

    kind: Literal["scaled"] = "scaled"
    output_norm: NormSpec | None = None
    scalar: bool = True

    def own(self, site: Site) -> dict[str, Weight]:
        return {"scalar": Weight((1,), "vector", Init.constant(1.0))} if self.scalar else {}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.output_norm is None else {"output_norm": (self.output_norm, site.child("output_norm"))}

    def build(self, site: Site) -> ScaledResidual:
        return ScaledResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls.model_validate({"output_norm": "rmsnorm", "scalar": False})


class ScaledResidual(Residual):
    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        y = f(h)
        total = h + (y if self.spec.output_norm is None else self.output_norm(y, step))
        return total * self.scalar if self.spec.scalar else total


def reference(spec: Scaled, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, D] in float64, one token at a time; the norm is RMSNorm."""
    rows = []
    for row, y in zip(h, f(h), strict=True):
        if spec.output_norm is not None:
            eps: float = spec.output_norm.eps  # type: ignore[attr-defined]
            y = y / ((y * y).mean() + eps) ** 0.5 * weights["output_norm.weight"]
        rows.append((row + y) * (weights["scalar"][0] if spec.scalar else 1.0))
    return torch.stack(rows)
