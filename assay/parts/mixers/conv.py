"""A short causal convolution: the last few tokens, one filter a channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.conv import short_conv
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Init, MixerSpec, Site, StateField, Weight


class Conv(MixerSpec):
    """act(sum_j w_j x_(t - size + 1 + j) + b), channel by channel and without a map.

    Placed before another mixer (a block's `conv`) it lets a token know its neighbours, which is what recall by a
    single layer needs (Fu et al. 2022, arXiv 2212.14052, section 3.1, the shift; Arora et al. 2023, arXiv 2312.04927).
    """

    kind: Literal["conv"] = "conv"
    size: int = Field(default=3, ge=2)
    act: Activation | None = None
    bias: bool = False

    def check(self, site: Site) -> None:
        if site.d_in != site.d_out:
            raise ValueError(f"a convolution keeps its width: {site.d_in} channels do not become {site.d_out}")

    def pieces(self, site: Site) -> Mapping[str, int]:
        """Each rank makes all channels: a few products a token, and nothing to exchange."""
        return {"tensor": 0}

    def own(self, site: Site) -> dict[str, Weight]:
        found = {"weight": Weight((site.d_in, self.size), "vector", Init("uniform", self.size**-0.5))}
        return found | ({"bias": Weight((site.d_in,), "vector", Init.constant(0.0))} if self.bias else {})

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("tail", "sequence", (self.size - 1, site.d_in)),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return Cost(2 * self.size * site.d_in * new)

    def build(self, site: Site) -> ConvMixer:
        return ConvMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(size=5, act="silu", bias=True)


class ConvMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        past = lanes.start(here.state.load("tail", step))
        y, tail = short_conv(lanes.lay(x), self.weight, self.bias if self.spec.bias else None, past, lanes)
        if here.state.keeps:
            here.state.store(step, tail=lanes.ends(tail, step))
        y = lanes.flat(y)
        return y if self.spec.act is None else activate(self.spec.act, y)


def reference(spec: Conv, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence, one token and one tap at a time."""
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[0])
        for j in range(spec.size):
            at = t - spec.size + 1 + j
            if at >= 0:
                total = total + weights["weight"][:, j] * x[at]
        rows.append(total + weights.get("bias", torch.zeros_like(total)))
    y = torch.stack(rows)
    return y if spec.act is None else reference_activation(spec.act, y)
