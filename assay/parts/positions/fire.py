"""FIRE: a small network of how far back a key stands, as a share of what the query has behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from assay.ops.attend import Bias
from assay.parts.base import Position
from assay.parts.positions._distance import between, refuse_heads
from assay.spec.base import Cost, Init, PositionSpec, Site, Weight


class Fire(PositionSpec):
    """Adds f(psi(|i - j|) / psi(max(L, i))), psi(x) = ln(1 + c x). Li et al. 2023, arXiv 2310.04418, eqs. 4 and 5.

    f: one hidden layer of `width` ReLUs, an output a head, shared by the layers that name this scheme. c starts at
    `curve`, and L at `length`, which is learned as a factor of it; both act by their absolute value. Up to L tokens
    the bias is one of the distance; from there on the same shares of a longer text get the same biases.
    """

    kind: Literal["fire"] = "fire"
    heads: int = Field(ge=1)
    width: int = Field(default=32, ge=1)
    curve: float = Field(default=0.1, gt=0.0)
    length: int = Field(default=512, ge=1)

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_heads("fire", self.heads, heads)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def own(self, site: Site) -> dict[str, Weight]:
        inner, outer = Init("uniform", 1.0), Init("uniform", self.width**-0.5)  # fan-in ** -0.5, as torch's linears
        return {
            "curve": Weight((1,), "vector", Init.constant(self.curve)),
            "stretch": Weight((1,), "vector", Init.constant(1.0)),
            "inner": Weight((self.width,), "vector", inner),
            "inner_bias": Weight((self.width,), "vector", inner),
            "outer": Weight((self.heads, self.width), "vector", outer, split=0),
            "outer_bias": Weight((self.heads,), "vector", outer, split=0),
        }

    def told(self, site: Site, heads: int, new: int, pairs: int, square: int) -> Cost:
        """The hidden layer once a pair, and an output a head. Executed: only the second is a matrix product."""
        return Cost(2 * self.width * (heads + 1) * pairs, 2 * self.width * heads * square)

    def build(self, site: Site) -> FirePosition:
        return FirePosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4, width=8, length=5)
        yield cls(heads=4, width=3, curve=0.7, length=64)


class FirePosition(Position):
    def bias(self) -> Bias:
        return self

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """scores [..., H, T, S] plus the bias; q_pos [..., T] and k_pos [..., S] may have an axis of one for H."""
        far = between(scores, q_pos, k_pos).abs()
        place = q_pos.squeeze(-2) if q_pos.dim() == scores.dim() - 1 else q_pos
        whole = torch.maximum(place.to(self.stretch.dtype), self.stretch.abs() * self.spec.length)
        share = self.curved(far) / self.curved(whole)[..., None]
        hidden = torch.relu(share[..., None] * self.inner + self.inner_bias)
        return scores + (hidden @ self.outer.T + self.outer_bias).movedim(-1, -3).to(scores.dtype)

    def curved(self, x: Int[Tensor, "*d"] | Tensor) -> Tensor:
        return torch.log1p(self.curve.abs() * x)


def reference(spec: Fire, weights: dict[str, Tensor], q_pos: Tensor, k_pos: Tensor, heads: int) -> Tensor:
    """[H, T, S] in float64, a pair at a time."""
    c, least = abs(float(weights["curve"])), abs(float(weights["stretch"])) * spec.length
    out = torch.empty(heads, len(q_pos), len(k_pos), dtype=torch.float64)
    for t, i in enumerate(q_pos.tolist()):
        for s, j in enumerate(k_pos.tolist()):
            share = math.log(1 + c * abs(i - j)) / math.log(1 + c * max(least, i))
            hidden = [max(0.0, share * float(w) + float(b)) for w, b in zip(weights["inner"], weights["inner_bias"])]
            for h in range(heads):
                total = sum(float(w) * x for w, x in zip(weights["outer"][h], hidden))
                out[h, t, s] = total + float(weights["outer_bias"][h])
    return out
