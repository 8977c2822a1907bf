"""Classification of whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Head
from assay.parts.heads._pool import Pool, pool
from assay.spec.base import Cost, Fan, HeadSpec, NormSpec, PartSpec, Site


class Classify(HeadSpec):
    """out(norm(act(dense(pooled)))): logits [B, labels], a row for each sequence. Devlin et al. 2018, 1810.04805.

    pool: what stands for a sequence, by default its first token. act: null leaves the dense map out.
    norm: after the activation (ModernBERT, arXiv 2412.13663). dense_bias: a bias in the dense map.
    """

    names_tokens: ClassVar[bool] = False
    kind: Literal["classify"] = "classify"
    labels: int = Field(ge=1)
    pool: Pool = "first"
    act: Activation | Literal["tanh"] | None = "tanh"
    dense_bias: bool = True
    norm: NormSpec | None = None

    def check(self, site: Site) -> None:
        if self.act is None and not self.dense_bias:
            raise ValueError("`dense_bias: false` says nothing beside `act: null`, which leaves the dense map out")
        token_by_token("norm", self.norm)

    def linears(self, site: Site) -> dict[str, Fan]:
        dense = {} if self.act is None else {"dense": Fan(site.d_in, site.d_in, self.dense_bias)}
        return dense | {"out": Fan(site.d_in, self.labels, True, role="head")}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", site.d_in, site.d_in))}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The maps act once a sequence, not once a token."""
        flops = 2 * site.d_in * (self.labels + (0 if self.act is None else site.d_in)) * (1 - new)
        return Cost(flops, flops)

    def build(self, site: Site) -> ClassifyHead:
        return ClassifyHead(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(labels=3)
        yield cls(labels=5, pool="mean", act=None)
        yield cls.model_validate({"labels": 2, "pool": "last", "act": "gelu", "dense_bias": False, "norm": "layernorm"})


class ClassifyHead(Head):
    def forward(self, features: Float[Tensor, "N D"], step: Step, table: Tensor) -> Float[Tensor, "B L"]:
        x = pool(features, step, self.spec.pool)
        if self.spec.act is not None:
            x = self.dense(x, step)
            x = torch.tanh(x) if self.spec.act == "tanh" else activate(self.spec.act, x)
        x = x if self.spec.norm is None else self.norm(x, step)
        logits: Tensor = self.out(x, step)
        return logits

    def loss(
        self, features: Tensor, targets: Int[Tensor, "N"], step: Step, table: Tensor, options: Any = None
    ) -> dict[str, Tensor]:
        """Sums over the sequences with a label, which stands at the sequence's first token (the others are -1).

        options: `smoothing` as in a language model's loss; `z` is refused.
        """
        if options is not None and options.z:
            raise ValueError("head 'classify' has no z-loss; accepted: z: 0")
        smoothing = options.smoothing if options is not None else 0.0
        labels, logits = targets.index_select(0, step.starts[:-1]), self(features, step, table)
        nll = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        smooth = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        return {"nll": nll, "count": (labels >= 0).sum(), "objective": smooth if smoothing else nll}
