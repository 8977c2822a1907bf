"""KERPLE: biases that are kernels of the distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.parts.positions._distance import DistancePosition, refuse_heads
from assay.spec.base import Init, PositionSpec, Site, Weight

LEAST = 0.01
"""The smallest value that is drawn, that to which the paper's code clamps its parameters."""


class Kerple(PositionSpec):
    """Adds a learned kernel of the distance d = |i - j| for each head. Chi et al. 2022, arXiv 2205.09921.

    form: `log` is -a ln(1 + b d), `power` is -a d^b with 0 < b < 2 (section 4.2; ALiBi is b = 1 with a fixed). The
    parameters are ln a, and ln b or, for `power`, the logit of b / 2: positive without a clamp. Drawn evenly, as in the
    paper's code: a up to 2 and b up to 1, for `power` a up to 1 and b up to 2.
    """

    kind: Literal["kerple"] = "kerple"
    heads: int = Field(ge=1)
    form: Literal["log", "power"] = "log"

    def fits(self, heads: int, head_dim: int) -> None:
        refuse_heads("kerple", self.heads, heads)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def own(self, site: Site) -> dict[str, Weight]:
        drawn = {"strength": Init.between(LEAST, 2.0, link="log"), "bend": Init.between(LEAST, 1.0, link="log")}
        if self.form == "power":
            bend = Init.between(LEAST / 2, 1.0 - LEAST / 2, link="sigmoid")
            drawn = {"strength": Init.between(LEAST, 1.0, link="log"), "bend": bend}
        return {name: Weight((self.heads,), "vector", init, split=0) for name, init in drawn.items()}

    def build(self, site: Site) -> KerplePosition:
        return KerplePosition(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4)
        yield cls(heads=4, form="power")


class KerplePosition(DistancePosition):
    def by_distance(self, distance: Int[Tensor, "*d"]) -> Float[Tensor, "H *d"]:
        shape = (-1, *[1] * distance.dim())
        a, far = self.strength.exp().view(shape), distance.abs().to(self.strength.dtype)
        if self.spec.form == "log":
            return -a * torch.log1p(self.bend.exp().view(shape) * far)
        return -a * far ** (2 * torch.sigmoid(self.bend).view(shape))


def reference(spec: Kerple, weights: dict[str, Tensor], q_pos: Tensor, k_pos: Tensor, heads: int) -> Tensor:
    """[H, T, S] in float64, a number at a time."""
    out = torch.empty(heads, len(q_pos), len(k_pos), dtype=torch.float64)
    for h in range(heads):
        a, bend = math.exp(weights["strength"][h]), float(weights["bend"][h])
        b = math.exp(bend) if spec.form == "log" else 2 / (1 + math.exp(-bend))
        for t, i in enumerate(q_pos.tolist()):
            for s, j in enumerate(k_pos.tolist()):
                out[h, t, s] = -a * (math.log(1 + b * abs(i - j)) if spec.form == "log" else abs(i - j) ** b)
    return out
