"""The plain linear map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from torch import Tensor, nn

from assay.ops.linear import linear, linears
from assay.ops.step import Step
from assay.parts.base import Linear, empty
from assay.spec.base import Fan, Init, LinearSpec, Site, Weight


class Dense(LinearSpec):
    """y = x W^T + b, W stored [out, in]."""

    kind: Literal["dense"] = "dense"

    def fan(self, fan: Fan, site: Site) -> dict[str, Weight]:
        init = site.init.out(fan.d_in, site.layers) if fan.out else site.init.matrix(fan.d_in)
        table = {"weight": Weight((fan.d_out, fan.d_in), fan.role, init, split=fan.split)}
        if fan.bias:
            table["bias"] = Weight((fan.d_out,), "vector", Init.constant(0.0), split=0 if fan.split == 0 else None)
        return table

    def build_fan(self, fan: Fan, site: Site, name: str) -> DenseLinear:
        return DenseLinear(self, fan, site, name)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()


class DenseLinear(Linear):
    """Parameters `weight` [out, in] and, when declared, `bias` [out]."""

    bias: nn.Parameter | None

    def __init__(self, spec: Dense, fan: Fan, site: Site, name: str) -> None:
        nn.Module.__init__(self)
        self.spec, self.site, self.name = spec, site, f"{site.name}.{name}"
        self.register_parameter("bias", None)
        for key, weight in spec.fan(fan, site).items():
            self.register_parameter(key, empty(weight))

    def mingles(self) -> str | None:
        return None

    def forward(self, x: Tensor, step: Step | None) -> Tensor:
        return linear(x, self.weight, self.bias)


def together(x: Tensor, step: Step | None, *maps: Linear) -> list[Tensor]:
    """What each of these maps makes of x. In inference plain ones are one call: x is read (in 8 or 4 bits: rounded)
    once, and what they own stays apart. The values are those of each map by itself, to the bit where a compiled kernel
    makes them."""
    plain = all(type(m) is DenseLinear and not m._forward_hooks and not m._forward_pre_hooks for m in maps)
    if not plain or torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return [m(x, step) for m in maps]
    return linears(x, [(m.weight, m.bias) for m in maps])
