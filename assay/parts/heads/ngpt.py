"""nGPT's head: cosines with the vocabulary, and how sure each word may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from jaxtyping import Float
from torch import Tensor

from assay.ops.linear import linear
from assay.ops.precision import high
from assay.ops.step import Step
from assay.parts.heads.lm import LmHeadPart
from assay.parts.linears.unit import normalised
from assay.spec.base import Cost, HeadSpec, Init, Site, Weight


class NgptHead(HeadSpec):
    """logits = s cos(x, e), s learned for each token, from 1 on. Loshchilov et al. 2024, arXiv 2410.01131, eq. 3.

    For unit x: the rows e of the table are normalised here. s is stored times d_model^-0.5 (section 2.5). `tie` uses
    the embedding's table.
    """

    kind: Literal["ngpt"] = "ngpt"
    tie: bool = False

    def own(self, site: Site) -> dict[str, Weight]:
        found = {"gain": Weight((site.d_out,), "vector", Init.constant(site.d_in**-0.5))}
        table = Weight((site.d_out, site.d_in), "head", site.init.matrix(site.d_in))
        return found if self.tie else found | {"weight": table}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """A tied head multiplies with the embedding's table, which is a lookup everywhere else."""
        flops = 2 * site.d_in * site.d_out * new if self.tie else 0
        return Cost(flops, flops)

    def build(self, site: Site) -> NgptHeadPart:
        return NgptHeadPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(tie=True)


class NgptHeadPart(LmHeadPart):
    def mingles(self) -> str | None:
        return None

    def logits(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "N v"]:
        rows = normalised(table if self.spec.tie else self.weight, 1, self.name)
        scaled = rows * (high(self.gain) * self.site.d_in**0.5)[:, None]
        return linear(features, scaled.to(features.dtype), None)
