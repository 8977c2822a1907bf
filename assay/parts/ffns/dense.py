"""The plain feed-forward network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import halved
from assay.parts.base import Ffn
from assay.spec.base import Fan, FfnSpec, Site


class DenseFfn(FfnSpec):
    """down(act(up x)). Vaswani et al. 2017, arXiv 1706.03762, section 3.3."""

    kind: Literal["dense"] = "dense"
    width: int = Field(ge=1)
    act: Activation = "gelu"
    bias: bool = False

    def refusals(self) -> Mapping[str, str]:
        return halved(self.width, f"a width of {self.width} is")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.width}

    def linears(self, site: Site) -> dict[str, Fan]:
        return {
            "up": Fan(site.d_in, self.width, self.bias, split=0),
            "down": Fan(self.width, site.d_out, self.bias, out=True, split=1),
        }

    def build(self, site: Site) -> DenseFfnPart:
        return DenseFfnPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=24)
        yield cls(width=17, act="relu", bias=True)
        yield cls(width=9, act="relu2")
        yield cls(width=9, act="gelu_tanh")
        yield cls(width=9, act="silu")


class DenseFfnPart(Ffn):
    def mingles(self) -> str | None:
        # torch's pointwise loops take 64 values at a time, and what is left in another way
        return None if self.spec.width % 64 == 0 else super().mingles()

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        return self.down(activate(self.spec.act, self.up(x, step)), step)


def reference(spec: DenseFfn, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64, one token at a time."""
    zero = torch.zeros((), dtype=x.dtype)
    rows = []
    for row in x:
        inner = weights["up.weight"] @ row + weights.get("up.bias", zero)
        inner = reference_activation(spec.act, inner)
        rows.append(weights["down.weight"] @ inner + weights.get("down.bias", zero))
    return torch.stack(rows)
