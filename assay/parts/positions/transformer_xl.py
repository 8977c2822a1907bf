"""Transformer-XL's relative positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from assay.ops.attend import Bias
from assay.ops.step import Step, View
from assay.parts.base import Position
from assay.parts.positions._distance import refuse_heads
from assay.parts.positions._scaling import inverse
from assay.parts.positions.shaw import refuse_queries, refuse_size
from assay.spec.base import Cost, Init, PositionSpec, Site, Weight


class TransformerXl(PositionSpec):
    """(q + u) . k_j + (q + v) . W r_(i - j), over sqrt(head_dim). Dai et al. 2019, arXiv 1901.02860, section 3.3.

    r are sinusoids of the distance, `dim` of them (null: d_model), half sines and half cosines as in the paper's code;
    u and v a bias a head on what queries ask of contents and of distances, starting at 0. W, u and v are shared by
    the layers that name this scheme. Keys are stored as they are; no table ends.
    """

    kind: Literal["transformer_xl"] = "transformer_xl"
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dim: int | None = Field(default=None, ge=2)
    theta: float = Field(default=10_000.0, gt=1.0)

    @property
    def reads(self) -> bool:
        """u joins the queries when keys are read: behind the norms."""
        return True

    def check(self, site: Site) -> None:
        if self.size(site) % 2:
            raise ValueError(f"`dim` is {self.size(site)}; a sine and a cosine each: an even number is accepted")

    def size(self, site: Site) -> int:
        return site.d_in if self.dim is None else self.dim

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_heads("transformer_xl", self.heads, heads)
        refuse_size("transformer_xl", self.head_dim, head_dim)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def own(self, site: Site) -> dict[str, Weight]:
        dim, biases = self.size(site), Init.constant(0.0)
        found = {n: Weight((self.heads, self.head_dim), "vector", biases, split=0) for n in ("content", "distance")}
        return found | {"map": Weight((self.heads, self.head_dim, dim), "vector", site.init.matrix(dim), split=0)}

    def told(self, site: Site, heads: int, new: int, pairs: int, square: int) -> Cost:
        """Each query with W, and what it asks with the sinusoids of each key's place."""
        dim = self.size(site)
        asked = 2 * heads * self.head_dim * dim * new
        return Cost(asked + 2 * heads * dim * pairs, asked + 2 * heads * dim * square)

    def build(self, site: Site) -> TransformerXlPosition:
        return TransformerXlPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4, head_dim=8)
        yield cls(heads=4, head_dim=8, dim=6, theta=50.0)


class TransformerXlPosition(Position):
    def on_read(self, q: Tensor, view: View, step: Step) -> tuple[Tensor, View]:
        if q.shape[-2:] != self.content.shape:
            told = f"queries of {' x '.join(map(str, q.shape[-2:]))}"
            raise ValueError(f"transformer_xl positions: {told}; accepted: `heads` x `head_dim`, a key beside each")
        return q + self.content.to(q.dtype), view

    def bias(self) -> Bias:
        return self

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """scores [..., H, T, S] plus the bias, for unscaled q + u [..., H, T, K].

        sin((i - j) w) and cos((i - j) w) are products of the two places' own: no r of a pair is ever made.
        """
        spec = self.spec
        refuse_queries("transformer_xl", spec.head_dim, q)
        shift, scale = (self.distance - self.content)[:, None], spec.head_dim**-0.5
        a, b = ((q + shift.to(q.dtype)) @ (self.map * scale).to(q.dtype)).chunk(2, -1)  # of sines, of cosines
        (q_sin, q_cos), (k_sin, k_cos) = (self.waves(p, scores, q.dtype) for p in (q_pos, k_pos))
        asked = torch.cat([a * q_sin + b * q_cos, b * q_sin - a * q_cos], -1)
        return scores + (asked @ torch.cat([k_cos, k_sin], -1).transpose(-1, -2)).to(scores.dtype)

    def waves(self, places: Int[Tensor, "*n"], scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sines and cosines [..., 1, n, dim / 2], to meet scores [..., H, T, S]."""
        inv = inverse(self.spec.theta, self.spec.size(self.site), places.device)
        angle = places[..., None].to(inv.dtype) * inv
        angle = angle if angle.dim() == scores.dim() else angle.unsqueeze(-3)
        return angle.sin().to(dtype), angle.cos().to(dtype)


def reference(
    spec: TransformerXl, weights: dict[str, Tensor], q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor
) -> Tensor:
    """All logits [H, T, S] in float64 for q [T, H, K] and k [S, H, K] before any position, a pair at a time."""
    out = torch.empty(q.shape[1], len(q_pos), len(k_pos), dtype=torch.float64)
    dim = weights["map"].shape[-1]
    for t, i in enumerate(q_pos.tolist()):
        for s, j in enumerate(k_pos.tolist()):
            w = [spec.theta ** (-2 * n / dim) for n in range(dim // 2)]
            r = [math.sin((i - j) * f) for f in w] + [math.cos((i - j) * f) for f in w]
            for h in range(q.shape[1]):
                told = weights["map"][h].double() @ torch.tensor(r, dtype=torch.float64)
                u, v = weights["content"][h].double(), weights["distance"][h].double()
                out[h, t, s] = ((q[t, h] + u) @ k[s, h] + (q[t, h] + v) @ told) / spec.head_dim**0.5
    return out
