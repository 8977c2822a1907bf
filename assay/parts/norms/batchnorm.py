"""Batch normalisation, the historical control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Norm
from assay.spec.base import Init, NormSpec, Site, Weight


class BatchNorm(NormSpec):
    """Normalises each feature over the tokens of the batch. Ioffe and Szegedy 2015, arXiv 1502.03167.

    In training a token's output depends on later tokens and on its batch neighbours, which is why language models do
    not use it. In evaluation it uses running statistics (`momentum`), held as parameters that no gradient reaches.
    """

    kind: Literal["batchnorm"] = "batchnorm"
    eps: float = 1e-5
    momentum: float = 0.1
    refuses: ClassVar[Mapping[str, str]] = {
        "causal": "in training the statistics of a batch include later tokens",
        "neighbours": "in training the statistics of a batch include the other sequences",
        "packing": "in training the statistics of a batch include the other documents",
    }

    def own(self, site: Site) -> dict[str, Weight]:
        names = {"weight": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
        return {name: Weight((site.d_in,), "vector", Init.constant(value)) for name, value in names.items()}

    def build(self, site: Site) -> BatchNormPart:
        return BatchNormPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(eps=1e-2, momentum=0.5)


class BatchNormPart(Norm):
    """[N, D] -> [N, D]; padding (seq -1) is left out of the statistics."""

    def __init__(self, spec: BatchNorm, site: Site) -> None:
        super().__init__(spec, site)
        self.mean.requires_grad_(False)
        self.var.requires_grad_(False)

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            mean, var = self.statistics(x, step)
        return (x - mean) * torch.rsqrt(var + self.spec.eps) * self.weight + self.bias

    def statistics(self, x: Tensor, step: Step | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each feature over the real tokens; the running ones move towards them."""
        real = torch.ones_like(x[:, :1]) if step is None else (step.seq >= 0).to(x.dtype)[:, None]
        total = (lambda t: t) if step is None else step.total
        count = total(real.sum()).clamp(min=1.0)
        mean = total((x * real).sum(0)) / count
        var = total(((x - mean).square() * real).sum(0)) / count
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1.0)
            self.mean.lerp_(mean.to(self.mean.dtype), self.spec.momentum)
            self.var.lerp_(unbiased.to(self.var.dtype), self.spec.momentum)
        return mean, var


def reference(spec: BatchNorm, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """[N, D] in float64 with the running statistics (evaluation)."""
    rows = [(row - weights["mean"]) / (weights["var"] + spec.eps) ** 0.5 for row in x]
    return torch.stack([row * weights["weight"] + weights["bias"] for row in rows])
