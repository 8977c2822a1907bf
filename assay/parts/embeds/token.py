"""Token embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.step import Step
from assay.parts.base import Embed
from assay.spec.base import EmbedSpec, NormSpec, Site, Weight


class TokenEmbed(EmbedSpec):
    """A row of a [V, D] table, times `scale` (Gemma: sqrt(D); Vaswani et al. 2017, section 3.4).

    The site's d_in is the vocabulary. norm: a norm on the embedding (BLOOM).
    """

    kind: Literal["token"] = "token"
    scale: float = 1.0
    norm: NormSpec | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    def own(self, site: Site) -> dict[str, Weight]:
        return {"weight": Weight((site.d_in, site.d_out), "embed", site.init.embedding(site.d_out), split=0)}

    def children(self, site: Site) -> dict[str, tuple[NormSpec, Site]]:  # type: ignore[override]
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", site.d_out, site.d_out))}

    def build(self, site: Site) -> TokenEmbedPart:
        return TokenEmbedPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(scale=2.5)
        yield cls.model_validate({"norm": "rmsnorm"})


class TokenEmbedPart(Embed):
    def forward(self, step: Step) -> Float[Tensor, "N D"]:
        x = F.embedding(step.ids, self.weight)
        x = x if self.spec.scale == 1.0 else x * self.spec.scale
        x = x if self.spec.norm is None else self.norm(x, step)
        return F.dropout(x, self.spec.dropout, self.training)

    def table(self) -> Tensor:
        return self.weight
