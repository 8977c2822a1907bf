"""T5's relative position buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.parts.positions._distance import DistancePosition, refuse_heads
from assay.spec.base import Init, PositionSpec, Site, Weight


class T5(PositionSpec):
    """Adds a learned number for each head and bucket of distances. Raffel et al. 2019, arXiv 1910.10683, section 2.1.

    Half of the buckets are one distance each, the rest grow geometrically up to `max_distance`, beyond which all
    share the last. bidirectional: later keys have half of the buckets; else they all fall into that of distance 0.
    T5 itself leaves its scores unscaled: that is the mixer's `scores.scale: 1.0`.
    """

    kind: Literal["t5"] = "t5"
    heads: int = Field(ge=1)
    buckets: int = Field(default=32, ge=2)
    max_distance: int = Field(default=128, ge=2)
    bidirectional: bool = False

    def check(self, site: Site) -> None:
        if self.bidirectional and self.buckets % 4:
            raise ValueError(
                f"`buckets` is {self.buckets}; `bidirectional` splits them twice, so a multiple of 4 is accepted"
            )
        if self.buckets % 2 or self.max_distance <= self.exact:
            raise ValueError(
                f"`buckets` ({self.buckets}) must be even, and `max_distance` ({self.max_distance}) above the "
                f"{self.exact} distances that have a bucket of their own"
            )

    @property
    def exact(self) -> int:
        """Distances with a bucket of their own, on each side."""
        return self.buckets // (4 if self.bidirectional else 2)

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_heads("t5", self.heads, heads)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def own(self, site: Site) -> dict[str, Weight]:
        # A lookup: "vector" counts no FLOPs. d_model ** -0.5 is the spread that T5 starts from.
        return {"weight": Weight((self.buckets, self.heads), "vector", Init("normal", site.d_out**-0.5), split=1)}

    def build(self, site: Site) -> T5Position:
        return T5Position(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4, buckets=8, max_distance=12)
        yield cls(heads=4, buckets=16, max_distance=32, bidirectional=True)


def bucket(spec: T5, distance: Int[Tensor, "*d"]) -> Int[Tensor, "*d"]:
    """The bucket of query position minus key position."""
    side = spec.buckets // 2 if spec.bidirectional else spec.buckets
    later = (distance < 0).long() * side if spec.bidirectional else torch.zeros_like(distance)
    away = distance.abs() if spec.bidirectional else distance.clamp(min=0)
    # Float32 like the original, whose rounding decides the borders of the wide buckets.
    growth = (away.clamp(min=1).float() / spec.exact).log() / math.log(spec.max_distance / spec.exact)
    wide = spec.exact + (growth * (side - spec.exact)).long()
    return later + torch.where(away < spec.exact, away, wide.clamp(max=side - 1))


class T5Position(DistancePosition):
    def by_distance(self, distance: Int[Tensor, "*d"]) -> Float[Tensor, "H *d"]:
        return F.embedding(bucket(self.spec, distance), self.weight).movedim(-1, 0)


def reference(spec: T5, weights: dict[str, Tensor], q_pos: Tensor, k_pos: Tensor, heads: int) -> Tensor:
    """[H, T, S] in float64, a pair at a time."""
    table = weights["weight"].double()
    out = torch.empty(heads, len(q_pos), len(k_pos), dtype=torch.float64)
    for t, i in enumerate(q_pos.tolist()):
        for s, j in enumerate(k_pos.tolist()):
            side = spec.buckets // 2 if spec.bidirectional else spec.buckets
            away = abs(i - j) if spec.bidirectional else max(i - j, 0)
            if away < side // 2:
                b = away
            else:
                share = math.log(away / (side // 2)) / math.log(spec.max_distance / (side // 2))
                b = min(side // 2 + int(share * (side - side // 2)), side - 1)
            out[:, t, s] = table[b + (side if spec.bidirectional and j > i else 0)]
    return out
