"""The plain residual connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Residual
from assay.spec.base import ResidualSpec, Site


class Add(ResidualSpec):
    """h + f(h). He et al. 2015, arXiv 1512.03385."""

    kind: Literal["add"] = "add"

    def build(self, site: Site) -> AddResidual:
        return AddResidual(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()


class AddResidual(Residual):
    def mingles(self) -> str | None:
        return None

    def wrap(self, h: Tensor, f: Callable[[Tensor], Tensor], step: Step) -> Tensor:
        return h + f(h)


def reference(spec: Add, weights: dict[str, Tensor], h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return h + f(h)
