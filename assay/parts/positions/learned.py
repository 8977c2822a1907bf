"""A learned vector for every position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Position
from assay.parts.positions._lookup import lookup, refuse_context
from assay.spec.base import Init, NormSpec, PositionSpec, Site, Weight


class Learned(PositionSpec):
    """Adds row `position` of a trained [max, d_model] table to the embedding. Gehring et al. 2017, arXiv 1705.03122.

    max: rows of the table; null is the model's context. std: spread of the initial draw (GPT-2's 0.02).
    norm: a norm on the sum (BERT, BART). A position past the table raises: nothing was learned for it.
    """

    kind: Literal["learned"] = "learned"
    max: int | None = Field(default=None, ge=1)
    std: float = Field(default=0.02, ge=0.0)
    norm: NormSpec | None = None

    def limit(self, site: Site) -> int:
        return site.context if self.max is None else self.max

    def check(self, site: Site) -> None:
        refuse_context("learned", site.context, self.limit(site), "max")

    def own(self, site: Site) -> dict[str, Weight]:
        return {"weight": Weight((self.limit(site), site.d_out), "embed", Init("normal", self.std))}

    def children(self, site: Site) -> dict[str, tuple[NormSpec, Site]]:  # type: ignore[override]
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", site.d_out, site.d_out))}

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": 0}

    def build(self, site: Site) -> LearnedPosition:
        return LearnedPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(max=4096, std=0.5)
        yield cls.model_validate({"norm": "layernorm"})


class LearnedPosition(Position):
    def mingles(self) -> str | None:
        return None

    def on_embed(self, x: Float[Tensor, "N D"], step: Step) -> Float[Tensor, "N D"]:
        x = x + lookup(self.weight, step.positions, step, "learned").to(x.dtype)
        return x if self.spec.norm is None else self.norm(x, step)


def reference(spec: Learned, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """x [N, D] plus a row of the table, in float64; the norm is written out for a layernorm."""
    table = weights["weight"].double()
    rows = [row.double() + table[p] for row, p in zip(x, positions.tolist(), strict=True)]
    if spec.norm is not None:
        eps: float = spec.norm.eps  # type: ignore[attr-defined]
        rows = [(r - r.mean()) / (((r - r.mean()) ** 2).mean() + eps) ** 0.5 for r in rows]
        rows = [r * weights["norm.weight"].double() + weights["norm.bias"].double() for r in rows]
    return torch.stack(rows)
