"""The mean of all values so far: attention whose weights never change. A mixer in one file, for `--part`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, MixerSpec, Site, StateField


class CausalMean(MixerSpec):
    """W_out mean_{j <= i} W_v x_j: softmax attention with all scores equal.

    A strawman without a source. It mixes, remembers `width` numbers a sequence, and cannot choose what to look at.
    """

    kind: Literal["causal_mean"] = "causal_mean"
    width: int = Field(ge=1)

    def refusals(self) -> Mapping[str, str]:
        return {"split": f"a width of {self.width} is not cut in two"} if self.width % 2 else {}

    def linears(self, site: Site) -> dict[str, Fan]:
        return {"v": Fan(site.d_in, self.width, split=0), "out": Fan(self.width, site.d_out, out=True, split=1)}

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("sum", "sequence", (self.width,), "float32", split=0),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """One addition and one product a number; executed as the products of `decayed` with a key of size 1."""
        return Cost(2 * self.width * new, ops.cost(new, 1, (1, self.width), 1, ops.CHUNK).executed)

    def build(self, site: Site) -> CausalMeanMixer:
        return CausalMeanMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=8)
        yield cls(width=5)


class CausalMeanMixer(Recurrent):
    """[N, D] -> [N, D]. `v` and `out` exist because the spec declares them."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)  # tokens in order of time: [N, ...] <-> [L, T, ...]
        v, one = (lanes.lay(t)[:, :, None] for t in (self.v(x, step), torch.ones_like(x[:, :1])))  # one head
        past = lanes.start(here.state.load("sum", step))[:, None, None]  # [L, 1, 1, width]
        total, end = ops.decayed(one, one, v, None, past, lanes)
        if end is not None:
            here.state.store(step, sum=lanes.ends(end[:, 0, 0], step))
        count = (step.index + 1).to(x.dtype)[:, None]
        return self.out(here.tap("mix", lanes.flat(total[:, :, 0]) / count), step)


def reference(spec: CausalMean, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token at a time."""
    values = [weights["v.weight"] @ row for row in x]
    means = [sum(values[: i + 1]) / (i + 1) for i in range(len(values))]
    return torch.stack([weights["out.weight"] @ mean for mean in means])
