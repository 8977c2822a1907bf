"""Post-norm residuals: Vaswani's, and DeepNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

from pydantic import Field
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import NormSpec, PartSpec, ResidualSpec, Site

# The projections whose spread DeepNorm shrinks: values, outputs and the feed-forward maps, not queries and keys.
SHRUNK = ("v", "out", "up", "gate", "down")


class Post(ResidualSpec):
    """norm(alpha * h + f(h)). alpha 1 is Vaswani et al. 2017; `deep: true` is DeepNorm (Wang et al. 2022, 2203.00555).

    DeepNorm for a decoder of N layers: alpha = (2N)^(1/4), and the initial spread of the value, output and
    feed-forward maps times beta = (8N)^(-1/4) (table 1).
    """

    kind: Literal["post"] = "post"
    norm: NormSpec = Field(default="layernorm", validate_default=True)
    deep: bool = False

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {"norm": (self.norm, site.child("norm"))}

    def alpha(self, site: Site) -> float:
        return float((2 * site.layers) ** 0.25) if self.deep else 1.0

    def gain(self, weight: str, site: Site) -> float:
        shrunk = self.deep and weight.split(".")[0] in SHRUNK
        return float((8 * site.layers) ** -0.25) if shrunk else 1.0

    def build(self, site: Site) -> PostResidual:
        return PostResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls.model_validate({"deep": True, "norm": "rmsnorm"})


class PostResidual(Residual):
    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        alpha = self.spec.alpha(self.site)
        return self.norm((h if alpha == 1.0 else h * alpha) + f(h), step)


def reference(
    spec: Post, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor], layers: int = 1
) -> Tensor:
    """[N, D] in float64; the norm is written out for the two kinds that stand here."""
    x = h * ((2 * layers) ** 0.25 if spec.deep else 1.0) + f(h)
    if spec.norm.kind_name() == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    eps: float = spec.norm.eps  # type: ignore[attr-defined]
    x = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()
    return x * weights["norm.weight"] + weights.get("norm.bias", 0.0)
