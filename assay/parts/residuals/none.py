"""No residual connection: the control that shows what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import ResidualSpec, Site


class NoResidual(ResidualSpec):
    """f(h): a plain stack, as before He et al. 2015 (arXiv 1512.03385)."""

    kind: Literal["none"] = "none"

    def build(self, site: Site) -> NoResidualPart:
        return NoResidualPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()


class NoResidualPart(Residual):
    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        return f(h)


def reference(spec: NoResidual, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return f(h)
