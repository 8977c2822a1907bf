"""Gated feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, glu
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import halved
from assay.parts.base import Ffn
from assay.parts.linears.dense import together
from assay.spec.base import Fan, FfnSpec, Site


class Gated(FfnSpec):
    """down(act(gate x) * up x). Shazeer 2020, arXiv 2002.05202: silu is SwiGLU, gelu GEGLU, relu ReGLU.

    share: multiplied by sigmoid(w x), one number a token (the shared expert of Qwen1.5-MoE).
    """

    kind: Literal["gated"] = "gated"
    width: int = Field(ge=1)
    act: Activation = "silu"
    bias: bool = False
    share: bool = False

    def refusals(self) -> Mapping[str, str]:
        return halved(self.width, f"a width of {self.width} is")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.width}

    def linears(self, site: Site) -> dict[str, Fan]:
        table = {
            "gate": Fan(site.d_in, self.width, self.bias, split=0),
            "up": Fan(site.d_in, self.width, self.bias, split=0),
            "down": Fan(self.width, site.d_out, self.bias, out=True, split=1),
        }
        return table | {"share": Fan(site.d_in, 1)} if self.share else table

    def build(self, site: Site) -> GatedFfn:
        return GatedFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=24)
        yield cls(width=17, act="gelu_tanh", bias=True)
        yield cls(width=8, act="relu2", share=True)


class GatedFfn(Ffn):
    def mingles(self) -> str | None:
        # torch's pointwise loops take 64 values at a time, and what is left in another way
        return None if self.spec.width % 64 == 0 and not self.spec.share else super().mingles()

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        gate, up = together(x, step, self.gate, self.up)
        y = self.down(glu(self.spec.act, gate, up), step)
        return y * torch.sigmoid(self.share(x, step)) if self.spec.share else y


def reference(spec: Gated, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64, one token at a time."""

    def linear(name: str, row: Tensor) -> Tensor:
        y = weights[f"{name}.weight"] @ row
        return y + weights[f"{name}.bias"] if spec.bias else y

    rows = []
    for row in x:
        y = linear("down", reference_activation(spec.act, linear("gate", row)) * linear("up", row))
        rows.append(y / (1 + torch.exp(-weights["share.weight"] @ row)) if spec.share else y)
    return torch.stack(rows)
