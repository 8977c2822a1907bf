"""The minimal gated recurrent unit: gates that see the token alone, so that time can be scanned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan.elementwise import scan
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, MixerSpec, Site, StateField


class MinGru(MixerSpec):
    """h_t = (1 - z_t) h_(t-1) + z_t c_t with z_t = sigmoid(W_z x_t), c_t = g(W_h x_t). Feng et al. 2024, arXiv
    2410.01201, section 3.1.

    width: null is d_model. positive: g(x) = x + 1/2 above 0 and sigmoid(x) below (their appendix B), else g(x) = x.
    """

    kind: Literal["mingru"] = "mingru"
    width: int | None = Field(default=None, ge=1)
    positive: bool = True
    bias: bool = True

    def refusals(self) -> Mapping[str, str]:
        odd = self.width is not None and self.width % 2
        return {"split": f"a width of {self.width} is not cut in two"} if odd else {}

    def channels(self, site: Site) -> int:
        return site.d_in if self.width is None else self.width

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.channels(site)}

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.channels(site)
        table = {name: Fan(site.d_in, width, self.bias, split=0) for name in ("gate", "candidate")}
        return table | {"out": Fan(width, site.d_out, self.bias, out=True, split=1)}

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("h", "sequence", (self.channels(site),), "float32", split=0),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return Cost(4 * self.channels(site) * new)

    def build(self, site: Site) -> MinGruMixer:
        return MinGruMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(width=13, positive=False, bias=False)


class MinGruMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        high = torch.promote_types(x.dtype, torch.float32)
        z, c = torch.sigmoid(self.gate(x, step).to(high)), self.candidate(x, step).to(high)
        if self.spec.positive:
            c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        past = lanes.start(here.state.load("h", step))
        h, end = scan(lanes.lay(1 - z), lanes.lay(z * c), past, lanes)
        if here.state.keeps:
            here.state.store(step, h=lanes.ends(end, step))
        return self.out(here.tap("mix", lanes.flat(h).to(x.dtype)), step)


def reference(spec: MinGru, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token at a time."""

    def linear(name: str, row: Tensor) -> Tensor:
        y = weights[f"{name}.weight"] @ row
        return y + weights[f"{name}.bias"] if spec.bias else y

    rows, h = [], torch.zeros(1, dtype=x.dtype)
    for row in x:
        z, c = 1 / (1 + torch.exp(-linear("gate", row))), linear("candidate", row)
        if spec.positive:
            c = torch.where(c >= 0, c + 0.5, 1 / (1 + torch.exp(-c)))
        h = (1 - z) * h + z * c
        rows.append(linear("out", h))
    return torch.stack(rows)
