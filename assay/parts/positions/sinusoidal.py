"""Sines and cosines of the position, added to the embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Position
from assay.parts.positions._scaling import inverse
from assay.spec.base import PositionSpec, Site


class Sinusoidal(PositionSpec):
    """Adds scale * PE, PE(p, 2i) = sin(p / theta^(2i/D)), PE(p, 2i+1) = cos of the same.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5: sine and cosine interleaved, as printed there.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    theta: float = Field(default=10_000.0, gt=1.0)
    scale: float = 1.0

    def check(self, site: Site) -> None:
        if site.d_out % 2:
            raise ValueError(f"d_model is {site.d_out}; sinusoidal positions come in pairs, so it must be even")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": 0}

    def build(self, site: Site) -> SinusoidalPosition:
        return SinusoidalPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(theta=50.0, scale=0.3)


def encode(positions: Int[Tensor, "*n"], dim: int, theta: float = 10_000.0) -> Float[Tensor, "*n D"]:
    """PE of every position, [..., dim]; float64 where the device has it."""
    angles = positions[..., None] * inverse(theta, dim, positions.device)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class SinusoidalPosition(Position):
    def on_embed(self, x: Float[Tensor, "N D"], step: Step) -> Float[Tensor, "N D"]:
        return x + (encode(step.positions, x.shape[-1], self.spec.theta) * self.spec.scale).to(x.dtype)


def reference(spec: Sinusoidal, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """x [N, D] in float64, a number at a time."""
    out = x.double().clone()
    dim = out.shape[1]
    for n, p in enumerate(positions.tolist()):
        for i in range(0, dim, 2):
            out[n, i] += spec.scale * math.sin(p / spec.theta ** (i / dim))
            out[n, i + 1] += spec.scale * math.cos(p / spec.theta ** (i / dim))
    return out
