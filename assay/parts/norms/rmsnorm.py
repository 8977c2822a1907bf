"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor

from assay.ops.norm import rms_norm
from assay.ops.step import Step
from assay.parts.base import Norm
from assay.spec.base import Init, NormSpec, Site, Weight


class RmsNorm(NormSpec):
    """x / sqrt(mean(x^2) + eps) * w. Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.

    weight: `one` stores w, `plus_one` stores w - 1 (Gemma), `none` has no parameter.
    """

    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = 1e-6
    weight: Literal["one", "plus_one", "none"] = "one"

    def own(self, site: Site) -> dict[str, Weight]:
        if self.weight == "none":
            return {}
        return {"weight": Weight((site.d_in,), "vector", Init.constant(1.0 if self.weight == "one" else 0.0))}

    def build(self, site: Site) -> RmsNormPart:
        return RmsNormPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(weight="plus_one", eps=1e-2)
        yield cls(weight="none")


class RmsNormPart(Norm):
    """[..., D] -> [..., D]; statistics and scale in float32 or better, then the input's dtype."""

    def mingles(self) -> str | None:
        return None

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        mode = self.spec.weight
        return rms_norm(x, None if mode == "none" else self.weight, self.spec.eps, 1.0 if mode == "plus_one" else 0.0)


def reference(spec: RmsNorm, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[N, D] in float64, one vector at a time."""
    rows = []
    for row in x:
        root = (sum(v**2 for v in row) / len(row) + spec.eps) ** 0.5
        scale = {"none": 1.0, "one": weights.get("weight", 1.0), "plus_one": weights.get("weight", 0.0) + 1.0}[
            spec.weight
        ]
        rows.append(row / root * scale)
    return torch.stack(rows)
