"""A short convolution between two gates that the token itself sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.conv import short_conv
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, StateField, Weight


class GatedConv(MixerSpec):
    """out(C * conv(B * X)), with B, C and X three maps of the input. LFM2, Liquid AI 2025, arXiv 2511.23404.

    The convolution has `size` taps, the last on the token itself, and one filter a channel; B gates what enters it and
    C what leaves it, without a nonlinearity. bias: of the maps and of the convolution.
    """

    kind: Literal["gated_conv"] = "gated_conv"
    size: int = Field(default=3, ge=2)
    bias: bool = False

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": site.d_in}

    def linears(self, site: Site) -> dict[str, Fan]:
        table = {name: Fan(site.d_in, site.d_in, self.bias, split=0) for name in ("b", "c", "value")}
        return table | {"out": Fan(site.d_in, site.d_out, self.bias, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        found = {"weight": Weight((site.d_in, self.size), "vector", Init("uniform", self.size**-0.5), split=0)}
        return found | ({"shift": Weight((site.d_in,), "vector", Init.constant(0.0), split=0)} if self.bias else {})

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("tail", "sequence", (self.size - 1, site.d_in), split=1),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The taps, executed as elementwise products."""
        return Cost(2 * self.size * site.d_in * new)

    def build(self, site: Site) -> GatedConvMixer:
        return GatedConvMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(size=5, bias=True)


class GatedConvMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        past = lanes.start(here.state.load("tail", step))
        entered = lanes.lay(self.b(x, step) * self.value(x, step))
        y, tail = short_conv(entered, self.weight, self.shift if self.spec.bias else None, past, lanes)
        if here.state.keeps:
            here.state.store(step, tail=lanes.ends(tail, step))
        return self.out(here.tap("mix", self.c(x, step) * lanes.flat(y)), step)


def reference(spec: GatedConv, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence, one token and one tap at a time."""
    zero = torch.zeros((), dtype=x.dtype)

    def linear(name: str, row: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ row + weights.get(f"{name}.bias", zero)

    entered = [linear("b", row) * linear("value", row) for row in x]
    rows = []
    for t, row in enumerate(x):
        total = weights.get("shift", zero)
        for j in range(spec.size):
            at = t - spec.size + 1 + j
            if at >= 0:
                total = total + weights["weight"][:, j] * entered[at]
        rows.append(linear("out", linear("c", row) * total))
    return torch.stack(rows)
