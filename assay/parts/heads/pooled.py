"""Embeddings of whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Head
from assay.parts.heads._pool import Pool, pool
from assay.spec.base import Cost, Fan, HeadSpec, Site


class Pooled(HeadSpec):
    """One vector a sequence, of length 1 where `normalise`. Reimers and Gurevych 2019, arXiv 1908.10084, section 3.

    pool: the mean over the tokens, the first one (BERT's [CLS]), or the last (decoders). Its output is [B, d_model].
    act: null, or a dense map with a bias behind the pooling, and then this: with `first`, BERT's own pooled output
    (Devlin et al. 2018, arXiv 1810.04805, in their code).
    """

    names_tokens: ClassVar[bool] = False
    kind: Literal["pooled"] = "pooled"
    pool: Pool = "mean"
    normalise: bool = True
    act: Literal["tanh"] | None = None

    def linears(self, site: Site) -> dict[str, Fan]:
        return {} if self.act is None else {"dense": Fan(site.d_in, site.d_in, bias=True)}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The map acts once a sequence, not once a token."""
        flops = 0 if self.act is None else 2 * site.d_in**2 * (1 - new)
        return Cost(flops, flops)

    def build(self, site: Site) -> PooledHead:
        return PooledHead(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(pool="first", normalise=False)
        yield cls(pool="last")
        yield cls(pool="first", normalise=False, act="tanh")


class PooledHead(Head):
    def forward(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "B D"]:
        x = pool(features, step, self.spec.pool)
        x = x if self.spec.act is None else torch.tanh(self.dense(x, step))
        return F.normalize(x, dim=-1) if self.spec.normalise else x

    def loss(
        self, features: Tensor, targets: Int[Tensor, "N"], step: Step, table: Tensor, options: Any = None
    ) -> dict[str, Tensor]:
        raise ValueError(
            "head 'pooled' has no loss: its vectors are compared with each other; accepted: lm, mlm, classify"
        )
