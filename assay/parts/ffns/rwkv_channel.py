"""RWKV's channel mixing: a feed-forward network that also sees the token before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan.elementwise import shift
from assay.ops.step import Step
from assay.parts._checks import halved
from assay.parts.base import Ffn, InLanes
from assay.spec.base import Cost, Fan, FfnSpec, Init, Site, StateField, Weight


class RwkvChannel(FfnSpec):
    """sigmoid(W_r r) * W_v relu(W_k k)^2 with r, k = mu x_t + (1 - mu) x_(t-1). Peng et al. 2023, arXiv 2305.13048,
    eqs. 11, 12 and 18."""

    kind: Literal["rwkv_channel"] = "rwkv_channel"
    width: int = Field(ge=1)

    def refusals(self) -> Mapping[str, str]:
        return halved(self.width, f"a width of {self.width} is")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.width}

    def linears(self, site: Site) -> dict[str, Fan]:
        return {
            "r": Fan(site.d_in, site.d_out),
            "k": Fan(site.d_in, self.width, split=0),
            "v": Fan(self.width, site.d_out, out=True, split=1),
        }

    def own(self, site: Site) -> dict[str, Weight]:
        """Both mixes begin as in their code: (i / D)^p for channel i, p falling from 1 to nearly 0 over the layers."""
        power = 1 - site.layer / site.layers
        begin = Init.ramp(0.0, (1 - 1 / site.d_in) ** power, power=power)
        return {name: Weight((site.d_in,), "vector", begin) for name in ("mu_r", "mu_k")}

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("shift", "sequence", (site.d_in,)),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """Two mixes of two tokens."""
        return Cost(8 * site.d_in * new)

    def build(self, site: Site) -> RwkvChannelFfn:
        return RwkvChannelFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=24)
        yield cls(width=17)


class RwkvChannelFfn(InLanes, Ffn):
    """[N, D] -> [N, D']."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        before, last = shift(lanes.lay(x), lanes.start(here.state.load("shift", step)), lanes)
        if here.state.keeps:
            here.state.store(step, shift=lanes.ends(last, step))
        before = lanes.flat(before)
        r, k = (before + mu * (x - before) for mu in (self.mu_r, self.mu_k))
        return torch.sigmoid(self.r(r, step)) * self.v(self.k(k, step).relu().square(), step)


def reference(spec: RwkvChannel, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64, one token at a time."""
    before, rows = torch.zeros_like(x[0]), []
    for row in x:
        r, k = (weights[f"mu_{n}"] * row + (1 - weights[f"mu_{n}"]) * before for n in "rk")
        wide = weights["k.weight"] @ k
        wide = torch.where(wide > 0, wide, torch.zeros_like(wide)) ** 2
        rows.append(weights["v.weight"] @ wide / (1 + torch.exp(-weights["r.weight"] @ r)))
        before = row
    return torch.stack(rows)
