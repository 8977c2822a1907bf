"""nGPT's gated network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.activations import glu
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.ffns.gated import Gated, GatedFfn
from assay.parts.linears.dense import together
from assay.spec.base import Init, Site, Weight


class NgptFfn(Gated):
    """down(act(s_v sqrt(D) gate x) * s_u up x). Loshchilov et al. 2024, arXiv 2410.01131, eqs. 20 and 21.

    s_u and s_v are learned for each dimension and start at 1. Of a unit x and unit rows the products are of order
    D^-0.5; sqrt(D) brings the activation back to where it bends. The other fields are those of `gated`.
    """

    kind: Literal["ngpt"] = "ngpt"  # type: ignore[assignment]

    def own(self, site: Site) -> dict[str, Weight]:
        return {n: Weight((self.width,), "vector", Init.constant(1.0), split=0) for n in ("scale_gate", "scale_up")}

    def build(self, site: Site) -> NgptFfnPart:
        return NgptFfnPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=24)
        yield cls(width=17, act="gelu_tanh", bias=True, share=True)


class NgptFfnPart(GatedFfn):
    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        gate, up = together(x, step, self.gate, self.up)
        gate, up = gate * (self.scale_gate * self.site.d_in**0.5), up * self.scale_up
        y = self.down(glu(self.spec.act, gate, up), step)
        return y * torch.sigmoid(self.share(x, step)) if self.spec.share else y


def reference(spec: NgptFfn, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64, one token at a time."""
    zero, rows = torch.zeros((), dtype=x.dtype), []
    for row in x:
        v, u = (weights[f"{n}.weight"] @ row + weights.get(f"{n}.bias", zero) for n in ("gate", "up"))
        v, u = v * weights["scale_gate"] * len(row) ** 0.5, u * weights["scale_up"]
        y = weights["down.weight"] @ (reference_activation(spec.act, v) * u) + weights.get("down.bias", zero)
        rows.append(y / (1 + torch.exp(-weights["share.weight"] @ row)) if spec.share else y)
    return torch.stack(rows)
