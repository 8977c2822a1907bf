"""The masked-language-model head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.step import Step
from assay.parts.base import Head
from assay.parts.heads.lm import LmHeadPart
from assay.spec.base import Cost, Fan, HeadSpec, Init, NormSpec, PartSpec, Site, Weight


class MaskedLm(HeadSpec):
    """logits = norm(act(dense x)) W^T + b. Devlin et al. 2018, arXiv 1810.04805. `tie` uses the embedding's table."""

    kind: Literal["mlm"] = "mlm"
    act: Activation = "gelu"
    norm: NormSpec = Field(default="layernorm", validate_default=True)
    dense_bias: bool = True
    tie: bool = True
    bias: bool = True

    def linears(self, site: Site) -> dict[str, Fan]:
        out = {} if self.tie else {"out": Fan(site.d_in, site.d_out, self.bias, split=0, role="head")}
        return {"dense": Fan(site.d_in, site.d_in, self.dense_bias), **out}

    def own(self, site: Site) -> dict[str, Weight]:
        return {"bias": Weight((site.d_out,), "vector", Init.constant(0.0), split=0)} if self.tie and self.bias else {}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {"norm": (self.norm, site.child("norm", site.d_in, site.d_in))}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """A tied head multiplies with the embedding's table, which is a lookup everywhere else."""
        flops = 2 * site.d_in * site.d_out * new if self.tie else 0
        return Cost(flops, flops)

    def build(self, site: Site) -> MaskedLmHead:
        return MaskedLmHead(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls.model_validate({"act": "relu", "norm": "rmsnorm", "tie": False, "dense_bias": False})
        yield cls(bias=False)


class MaskedLmHead(LmHeadPart):
    """The loss is that of the language-model head: over the tokens with a target."""

    def mingles(self) -> str | None:
        return Head.mingles(self)

    def logits(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "N v"]:
        x = self.norm(activate(self.spec.act, self.dense(features, step)), step)
        if not self.spec.tie:
            logits: Tensor = self.out(x, step)
            return logits
        return F.linear(x, table.to(x.dtype), self.bias.to(x.dtype) if self.spec.bias else None)
