"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.state import State
from assay.ops.step import Step, View
from assay.parts.base import Position
from assay.spec.base import PositionSpec, Site


class Rope(PositionSpec):
    """Rotates pairs (i, i + dim/2) of q and k by position / theta^(2i/dim). Su et al. 2021, arXiv 2104.09864.

    dim: how many leading dimensions of a head are turned (partial RoPE); null turns all.
    """

    kind: Literal["rope"] = "rope"
    theta: float = Field(default=10_000.0, gt=0.0)
    dim: int | None = Field(default=None, ge=2)

    def check(self, site: Site) -> None:
        if self.dim is not None and self.dim % 2:
            raise ValueError(f"`dim` is {self.dim}; RoPE turns pairs, so it must be even")

    def build(self, site: Site) -> RopePosition:
        return RopePosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(theta=100.0, dim=4)


def turn(x: Float[Tensor, "N H K"], cos: Float[Tensor, "N 1 D"], sin: Float[Tensor, "N 1 D"]) -> Float[Tensor, "N H K"]:
    """Rotate the first 2 * D dimensions in half-split pairs."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, -1)


class RopePosition(Position):
    def frequencies(self, dim: int, device: torch.device) -> Float[Tensor, "D"]:
        return self.spec.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)

    def on_qk(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        dim = self.spec.dim or q.shape[-1]
        angles = step.positions[:, None, None].double() * self.frequencies(dim, q.device)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return turn(q, cos, sin), turn(k, cos, sin)
