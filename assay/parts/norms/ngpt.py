"""nGPT's norm on queries and keys: every head a unit vector, and how much each of its dimensions may say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.base import Norm
from assay.spec.base import Init, NormSpec, Site, Weight


class NgptNorm(NormSpec):
    """sqrt(size) s x / |x| for each run of `size` values. Loshchilov et al. 2024, arXiv 2410.01131, eqs. 15 and 16.

    size: a head's dimensions, of a `qk_norm` over all heads (`over: full`), behind the turn (`when: after`): with the
    usual scale of size^-0.5 the logits are sqrt(size) s_q s_k cosines. s is learned for each head and dimension, from 1
    on, and stored times width^-0.5 (section 2.5). Queries and keys have an s each; in the paper they share it.
    """

    kind: Literal["ngpt"] = "ngpt"
    size: int = Field(ge=1)

    def check(self, site: Site) -> None:
        if site.d_in % self.size:
            raise ValueError(f"`size` is {self.size}; the norm is over {site.d_in} values: accepted: a divisor of it")

    def own(self, site: Site) -> dict[str, Weight]:
        return {"weight": Weight((site.d_in,), "vector", Init.constant(site.d_in**-0.5))}

    def build(self, site: Site) -> NgptNormPart:
        self.check(site)  # inside a mixer a norm is built and not checked beside the others
        return NgptNormPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(size=1)
        yield cls(size=2)


class NgptNormPart(Norm):
    """[..., D] -> [..., D]; in float32 or better, then the input's dtype."""

    def mingles(self) -> str | None:
        return None

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        heads = F.normalize(high(x).unflatten(-1, (-1, self.spec.size)), dim=-1).flatten(-2)
        return (heads * (high(self.weight) * (self.site.d_in * self.spec.size) ** 0.5)).to(x.dtype)


def reference(spec: NgptNorm, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[N, D] in float64, one vector and one head at a time."""
    scale = weights["weight"] * len(weights["weight"]) ** 0.5 * spec.size**0.5
    return torch.stack([torch.cat([h / (h * h).sum() ** 0.5 for h in row.split(spec.size)]) * scale for row in x])
