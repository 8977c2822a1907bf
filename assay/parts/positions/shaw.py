"""Relative keys: what a query makes of a distance is a product with a learned vector of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from assay.ops.attend import Bias
from assay.parts.base import Position
from assay.parts.positions._distance import between
from assay.spec.base import Cost, Init, PositionSpec, Site, Weight


class Shaw(PositionSpec):
    """Adds q_i . a_(i - j) / sqrt(head_dim), a learned for each distance. Shaw et al. 2018, arXiv 1803.02155, eq. 4.

    reach: distances beyond it share its vector (the paper's k). bidirectional: later keys have vectors of their own;
    else they all have that of distance 0. One table for the heads, as in the paper, and for the layers that name this
    scheme. The paper's relative values are the mixer `relative_values`.
    """

    kind: Literal["shaw"] = "shaw"
    head_dim: int = Field(ge=1)
    reach: int = Field(default=128, ge=1)
    bidirectional: bool = False

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_size("shaw", self.head_dim, head_dim)

    @property
    def rows(self) -> int:
        """Distances with a vector."""
        return 2 * self.reach + 1 if self.bidirectional else self.reach + 1

    def own(self, site: Site) -> dict[str, Weight]:
        return {"weight": Weight((self.rows, self.head_dim), "vector", Init.fan_in(self.head_dim))}

    def told(self, site: Site, heads: int, new: int, pairs: int, square: int) -> Cost:
        """Each query with the vector of every distance."""
        flops = 2 * heads * self.rows * self.head_dim * new
        return Cost(flops, flops)

    def build(self, site: Site) -> ShawPosition:
        return ShawPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(head_dim=8, reach=5)
        yield cls(head_dim=8, reach=3, bidirectional=True)


def refuse_size(kind: str, size: int, asked: int) -> None:
    if size != asked:
        raise ValueError(f"the {kind} scheme has `head_dim: {size}`, but the layer tells it of {asked} dimensions")


def refuse_queries(kind: str, size: int, q: Tensor) -> None:
    """The queries that are multiplied with keys are not those that the scheme was told of (latent attention)."""
    if q.shape[-1] != size:
        raise ValueError(f"{kind} positions: queries of {q.shape[-1]} dimensions; accepted: {size} (`head_dim`)")


class ShawPosition(Position):
    def bias(self) -> Bias:
        return self

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """scores [..., H, T, S] plus the bias, for unscaled q [..., H, T, K]."""
        spec = self.spec
        refuse_queries("shaw", spec.head_dim, q)
        told = q @ (self.weight * spec.head_dim**-0.5).to(q.dtype).T  # [..., H, T, rows]: each query of each distance
        low = -spec.reach if spec.bidirectional else 0
        row = between(scores, q_pos, k_pos).clamp(low, spec.reach) - low
        return scores + told.gather(-1, row.unsqueeze(-3).expand(scores.shape)).to(scores.dtype)


def reference(spec: Shaw, weights: dict[str, Tensor], q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """[H, T, S] in float64 for q [T, H, K], a pair at a time."""
    out = torch.empty(q.shape[1], len(q_pos), len(k_pos), dtype=torch.float64)
    for t, i in enumerate(q_pos.tolist()):
        for s, j in enumerate(k_pos.tolist()):
            d = max(-spec.reach, min(spec.reach, i - j))
            a = weights["weight"][d + spec.reach if spec.bidirectional else max(d, 0)].double()
            out[:, t, s] = q[t].double() @ a / spec.head_dim**0.5
    return out
