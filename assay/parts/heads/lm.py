"""The language-model head: logits, and cross-entropy in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.ops.linear import linear
from assay.ops.step import Step
from assay.ops.vocabulary import Whole
from assay.parts.base import Head
from assay.spec.base import Cost, Fan, HeadSpec, Init, Site, Weight


@dataclass(frozen=True)
class LossOptions:
    """smoothing: label smoothing (Szegedy et al. 2016). z: weight of the z-loss z * logsumexp^2 (PaLM, 2204.02311)."""

    smoothing: float = 0.0
    z: float = 0.0
    piece: int = 1 << 22  # logits held at once


class LmHead(HeadSpec):
    """logits = scale * (x W^T + b), soft-capped: cap * tanh(logits / cap). `tie` uses the embedding's table."""

    kind: Literal["lm"] = "lm"
    tie: bool = False
    scale: float = 1.0
    softcap: float | None = Field(default=None, gt=0.0)
    bias: bool = False

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": site.d_out}

    def linears(self, site: Site) -> dict[str, Fan]:
        return {} if self.tie else {"out": Fan(site.d_in, site.d_out, self.bias, split=0, role="head")}

    def own(self, site: Site) -> dict[str, Weight]:
        return {"bias": Weight((site.d_out,), "vector", Init.constant(0.0), split=0)} if self.tie and self.bias else {}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """A tied head multiplies with the embedding's table, which is a lookup everywhere else."""
        flops = 2 * site.d_in * site.d_out * new if self.tie else 0
        return Cost(flops, flops)

    def build(self, site: Site) -> LmHeadPart:
        return LmHeadPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(tie=True, scale=0.5)
        yield cls(bias=True, softcap=3.0)
        yield cls(tie=True, bias=True)


class LmHeadPart(Head):
    def __init__(self, spec: Any, site: Site) -> None:
        super().__init__(spec, site)
        self.rows = Whole()

    def mingles(self) -> str | None:
        return None if self.spec.softcap is None or self.site.d_out % 64 == 0 else super().mingles()

    def forward(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "N V"]:
        return self.rows.gather(self.logits(self.rows.enter(features), step, table))

    def logits(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "N v"]:
        """Of the rows of the vocabulary that are here."""
        bias = self.bias.to(features.dtype) if self.spec.tie and self.spec.bias else None
        logits = linear(features, table.to(features.dtype), bias) if self.spec.tie else self.out(features, step)
        logits = logits if self.spec.scale == 1.0 else logits * self.spec.scale
        cap = self.spec.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(
        self, features: Tensor, targets: Int[Tensor, "N"], step: Step, table: Tensor, options: LossOptions | None = None
    ) -> dict[str, Tensor]:
        """Sums over the targets that are not -1: `nll` and `count`, and `objective`, which is what is minimised."""
        options, features = options or LossOptions(), self.rows.enter(features)
        rows = max(1, options.piece // self.site.d_out)
        if features.shape[0] <= rows:
            return self._piece(features, targets, step, table, options)
        total: dict[str, Tensor] = {}
        for x, t in zip(features.split(rows), targets.split(rows), strict=True):
            part = checkpoint(self._piece, x, t, step, table, options, use_reentrant=False)
            total = {k: total[k] + v if total else v for k, v in part.items()}
        return total

    def _piece(self, x: Tensor, targets: Tensor, step: Step, table: Tensor, options: LossOptions) -> dict[str, Any]:
        sums = self.rows.entropy(self.logits(x, step, table), targets, options.smoothing, options.z)
        return {"nll": sums.nll, "count": (targets >= 0).sum(), "objective": sums.objective}
