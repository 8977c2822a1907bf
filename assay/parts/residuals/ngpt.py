"""nGPT's residual: every stage takes a step towards what its branches say, on the unit sphere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import Init, ResidualSpec, Site, Weight


class Ngpt(ResidualSpec):
    """unit(h + a (unit(f(h)) - h)), a learned for each dimension. Loshchilov et al. 2024, arXiv 2410.01131, eq. 10.

    start: where a begins (about 1 / layers). It is stored as a d_model^-0.5 / start and used by its absolute value, so
    that it learns at the pace of the unit vectors (section 2.5). The rest of nGPT: the linear maps `unit`, the network
    and the head `ngpt`, `qk_norm`, and neither norms nor weight decay.
    """

    kind: Literal["ngpt"] = "ngpt"
    start: float = Field(default=0.05, gt=0.0)

    def own(self, site: Site) -> dict[str, Weight]:
        return {"rate": Weight((site.d_out,), "vector", Init.constant(site.d_out**-0.5))}

    def build(self, site: Site) -> NgptResidual:
        return NgptResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(start=0.5)


class NgptResidual(Residual):
    def open(self, x: Tensor) -> Tensor:
        return F.normalize(high(x), dim=-1).to(x.dtype)

    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        rate = high(self.rate).abs() * (self.spec.start * self.site.d_out**0.5)
        towards = F.normalize(high(f(h)), dim=-1)
        return F.normalize(torch.lerp(high(h), towards, rate.expand_as(towards)), dim=-1).to(h.dtype)


def reference(spec: Ngpt, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """[N, D] in float64, one token at a time, between the opening and the closing."""

    def unit(row: Tensor) -> Tensor:
        return row / (row * row).sum() ** 0.5

    h = torch.stack([unit(row) for row in h])
    rate = weights["rate"].abs() * spec.start * h.shape[1] ** 0.5
    return torch.stack([unit(row + rate * (unit(y) - row)) for row, y in zip(h, f(h), strict=True)])
