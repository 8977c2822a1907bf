"""Attention with linear biases, and the same as a function for anyone's attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.parts.positions._distance import DistancePosition, between, refuse_heads
from assay.spec.base import PositionSpec, Site


class Alibi(PositionSpec):
    """Adds -slope * |i - j| to the scores, a fixed slope a head. Press et al. 2021, arXiv 2108.12409.

    heads: query heads of the layers that name this scheme. Slopes: 2^(-8h/heads) for h = 1..heads; for heads that are
    not a power of two, those of the power below and then every second slope of the power above (the paper's code).
    """

    kind: Literal["alibi"] = "alibi"
    heads: int = Field(ge=1)

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_heads("alibi", self.heads, heads)

    def build(self, site: Site) -> AlibiPosition:
        return AlibiPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4)


def slopes(heads: int, device: torch.device | None = None) -> Float[Tensor, "H"]:
    """[heads] in float32, steepest first within each of the two series."""
    below = 2 ** int(math.log2(heads))
    first = torch.arange(1, below + 1, device=device) * (-8.0 / below)
    second = torch.arange(1, max(1, 2 * (heads - below)), 2, device=device) * (-4.0 / below)
    return torch.cat([first, second]).exp2()


class AlibiPosition(DistancePosition):
    def by_distance(self, distance: Int[Tensor, "*d"]) -> Float[Tensor, "H *d"]:
        slope = slopes(self.spec.heads, distance.device)
        return -slope.view(-1, *[1] * distance.dim()) * distance.abs()

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """As `by_distance` says, in one pass over the scores."""
        slope = slopes(self.spec.heads, scores.device).to(scores.dtype).view(-1, 1, 1)
        distance = between(scores, q_pos, k_pos).abs().to(scores.dtype)
        return torch.addcmul(scores, slope, distance.unsqueeze(-3), value=-1)


def alibi_bias(heads: int, q_pos: Int[Tensor, "T"], k_pos: Int[Tensor, "S"]) -> Float[Tensor, "H T S"]:
    """-slope * |i - j| in float32, to add to the scores of ordinary attention ([B, heads, T, S] broadcasts).

    i = torch.arange(q.shape[2])
    mask = torch.ones(len(i), len(i), dtype=torch.bool).tril()
    bias = alibi_bias(q.shape[1], i, i).masked_fill(~mask, float("-inf"))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    """
    if heads < 1:
        raise ValueError(f"`heads` is {heads}; at least 1 is accepted")
    return -slopes(heads, q_pos.device)[:, None, None] * (q_pos[:, None] - k_pos).abs()


def reference(spec: Alibi, weights: dict[str, Tensor], q_pos: Tensor, k_pos: Tensor, heads: int) -> Tensor:
    """[H, T, S] in float64, a number at a time."""

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * h / n) for h in range(1, n + 1)]

    power = 1
    while power * 2 <= heads:
        power *= 2
    slope = (series(power) + series(2 * power)[::2])[:heads]
    rows = [[[-m * abs(i - j) for j in k_pos.tolist()] for i in q_pos.tolist()] for m in slope]
    return torch.tensor(rows, dtype=torch.float64)
