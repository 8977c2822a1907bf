"""Token embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.dropout import dropout
from assay.ops.step import Step
from assay.ops.vocabulary import Whole
from assay.parts.base import Embed
from assay.spec.base import EmbedSpec, Init, NormSpec, Site, Weight


class TokenEmbed(EmbedSpec):
    """A row of a [V, D] table, times `scale` (Gemma: sqrt(D); Vaswani et al. 2017, section 3.4).

    The site's d_in is the vocabulary. norm: a norm on the embedding (BLOOM). types: rows of a second table for the
    step's `types` (BERT's segments, Devlin et al. 2018, arXiv 1810.04805); 0 is none, and a step without types is all
    of type 0. shared: an encoder's, which reads the table of the model around it (Vaswani et al. 2017, section 3.4).
    """

    kind: Literal["token"] = "token"
    scale: float = 1.0
    norm: NormSpec | None = None
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    types: int = Field(default=0, ge=0)
    shared: bool = False

    def borrows(self, outer: tuple[int, int], own: tuple[int, int]) -> None:
        if self.shared and outer != own:
            raise ValueError(
                f"`shared`: its table would be {own[0]} x {own[1]}, the model's is {outer[0]} x {outer[1]}"
            )

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {} if self.shared else {"tensor": site.d_in}

    def own(self, site: Site) -> dict[str, Weight]:
        init, table = site.init.embedding(site.d_out), {}
        if not self.shared:
            table["weight"] = Weight((site.d_in, site.d_out), "embed", init, split=0)
        if self.types:
            # One row is drawn as nothing: every token would get the same one.
            table["types"] = Weight((self.types, site.d_out), "embed", init if self.types > 1 else Init.constant(0.0))
        return table

    def children(self, site: Site) -> dict[str, tuple[NormSpec, Site]]:  # type: ignore[override]
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", site.d_out, site.d_out))}

    def build(self, site: Site) -> TokenEmbedPart:
        return TokenEmbedPart(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(scale=2.5)
        yield cls.model_validate({"norm": "rmsnorm"})
        yield cls(types=3)


class TokenEmbedPart(Embed):
    def __init__(self, spec: TokenEmbed, site: Site) -> None:
        super().__init__(spec, site)
        self.rows = Whole()
        self.outer: tuple[Embed, ...] = ()  # a tuple: the model around owns the module, and torch does not register it

    def mingles(self) -> str | None:
        return None

    def share(self, outer: Embed) -> None:
        self.outer = (outer,)

    def forward(self, step: Step) -> Float[Tensor, "N D"]:
        x = self.rows.lookup(step.ids, self.table())
        x = x if self.spec.scale == 1.0 else x * self.spec.scale
        if self.spec.types:
            x = x + (F.embedding(step.inputs["types"], self.types) if "types" in step.inputs else self.types[0])
        x = x if self.spec.norm is None else self.norm(x, step)
        return dropout(x, self.spec.dropout, self.training, step)

    def table(self) -> Tensor:
        if not self.spec.shared:
            return self.weight
        if not self.outer:
            raise ValueError(f"{self.name}: `shared` reads the table of the model around it, and this one stands alone")
        return self.outer[0].table()
