"""The position itself as a one-hot vector: the baseline that shows what a scheme must do better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Position
from assay.parts.positions._lookup import lookup, refuse_context
from assay.spec.base import PositionSpec, Site


class OneHot(PositionSpec):
    """Adds `scale` to dimension number `position` of the embedding; there are d_model positions and no more.

    A strawman without a source: exact, unlearned, no order between neighbours, and it ends at d_model.
    """

    kind: Literal["onehot"] = "onehot"
    scale: float = 1.0

    def limit(self, site: Site) -> int:
        return site.d_out

    def check(self, site: Site) -> None:
        refuse_context("onehot", site.context, self.limit(site), "d_model")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": 0}

    def build(self, site: Site) -> OneHotPosition:
        return OneHotPosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(scale=0.25)


class OneHotPosition(Position):
    def on_embed(self, x: Float[Tensor, "N D"], step: Step) -> Float[Tensor, "N D"]:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) * self.spec.scale
        return x + lookup(eye, step.positions, step, "onehot")


def reference(spec: OneHot, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """x [N, D] in float64 with one number of each row raised."""
    out = x.double().clone()
    for n, p in enumerate(positions.tolist()):
        out[n, p] += spec.scale
    return out
