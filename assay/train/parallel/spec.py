"""How a run is spread over processes. It changes what is computed where, and nothing of what is computed. No torch."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from assay.spec.base import Spec

AXES = ("pipeline", "data", "shard", "context", "expert", "tensor")
"""From the outermost to the innermost: neighbours along the last one have neighbouring ranks, so that they share a
machine."""
ROWS = ("data", "shard", "expert")
"""Axes along which processes read different rows."""
TOKENS = ("data", "shard", "context", "expert")
"""Axes along which processes hold different tokens: gradients of a weight that all of them have are summed over it."""
Recompute = Literal["none", "selective", "full"]


class ParallelSpec(Spec):
    """Processes along each axis; their product is how many there are.

    data: each has all weights and some rows. shard: weights, gradients and moments are cut as well, and gathered for
    each block (ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054). tensor: cuts the products inside a part (Shoeybi et
    al. 2019, arXiv 1909.08053); sequence: and the tokens between them (Korthikanti et al. 2022, arXiv 2205.05198).
    expert: experts. context: the tokens of a row; ring: their keys and values go from rank to rank and are not gathered
    (Liu et al. 2023, arXiv 2310.01889). pipeline: layers.
    offload: what `shard` cuts (weights, gradients, moments) stands on the host, where the optimiser steps; a device has
    what is gathered of it for a block.
    timeout_s: how long a process waits for another one before it gives up.
    """

    data: int = Field(1, ge=1)
    shard: int = Field(1, ge=1)
    tensor: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    context: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = False
    ring: bool = False
    offload: bool = False
    timeout_s: float = Field(60.0, gt=0.0)

    @model_validator(mode="after")
    def _something_to_spread_over(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true spreads tokens over the ranks of `tensor`, which is 1; accepted: false")
        if self.ring and self.context == 1:
            raise ValueError("ring: true passes keys round the ranks of `context`, which is 1; accepted: false")
        if self.offload and self.shard == 1:
            raise ValueError("offload: true keeps on the host what `shard` cuts, which is 1; accepted: false")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def processes(self) -> int:
        return math.prod(self.sizes.values())

    def size(self, *axes: str) -> int:
        return math.prod(getattr(self, axis) for axis in axes)
