"""Per-layer embeddings: every layer has a small embedding of its own of each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, glu
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Ffn
from assay.parts.norms.rmsnorm import RmsNorm
from assay.spec.base import Fan, FfnSpec, Init, NormSpec, PartSpec, Site, Weight

GIVEN = "per_layer"


class PerLayer(FfnSpec):
    """down(act(gate x) * e), e this layer's piece of (norm(map embed / sqrt(D)) + sqrt(width) table[id]) / sqrt(2).

    Gemma 3n and 4. The first layer has the table of `vocab` rows, the map and the norm for all layers, and gives what
    it finds to the others, whose `vocab` is null.
    """

    kind: Literal["per_layer"] = "per_layer"
    width: int = Field(ge=1)
    act: Activation = "gelu_tanh"
    vocab: int | None = Field(default=None, ge=1)
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)

    refuses: ClassVar[Mapping[str, str]] = {"pipeline": "the first layer gives to all others"}

    def check(self, site: Site) -> None:
        if (self.vocab is None) != (site.layer > 0):
            raise ValueError(
                f"`vocab`: {self.vocab} in layer {site.layer}; layer 0 has the table, the others have none"
            )
        token_by_token("norm", self.norm)
        if self.vocab is None and self.norm != RmsNorm():
            raise ValueError("`norm` stands in layer 0, beside `vocab`")

    def linears(self, site: Site) -> dict[str, Fan]:
        table = {"gate": Fan(site.d_in, self.width), "down": Fan(self.width, site.d_out, out=True)}
        return table if self.vocab is None else table | {"map": Fan(site.d_in, site.layers * self.width)}

    def own(self, site: Site) -> dict[str, Weight]:
        if self.vocab is None:
            return {}
        drawn = Init("normal", self.width**-0.5)
        return {"table": Weight((self.vocab, site.layers * self.width), "embed", drawn)}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.vocab is None else {"norm": (self.norm, site.child("norm", self.width, self.width))}

    def build(self, site: Site) -> PerLayerFfn:
        return PerLayerFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=6, vocab=11)
        yield cls(width=5, vocab=7, act="silu", norm=RmsNorm(eps=1e-2))


class PerLayerFfn(Ffn):
    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        if self.spec.vocab is not None:
            here.give(GIVEN, self.embedded(here.take("embed"), step))
        elif GIVEN not in here.given:
            raise ValueError(f"{self.name}: layer 0 has no `per_layer` network that gives its embeddings")
        e = here.take(GIVEN)[:, self.site.layer]
        return self.down(glu(self.spec.act, self.gate(x, step), e), step)

    def embedded(self, embed: Float[Tensor, "N D"], step: Step) -> Float[Tensor, "N L P"]:
        """Every layer's embedding of the step's tokens, from the ids and from the embedding the stack starts with."""
        size = self.spec.width
        seen = self.map(embed, step) * embed.shape[-1] ** -0.5
        looked = F.embedding(step.ids, self.table) * size**0.5
        return (self.norm(seen.unflatten(-1, (-1, size)), step) + looked.unflatten(-1, (-1, size))) * 2**-0.5


def reference(spec: PerLayer, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for layer 0 and tokens of id 0, whose embedding is x itself."""
    rows = []
    for row in x:
        seen = (weights["map.weight"][: spec.width] @ row) / len(row) ** 0.5
        eps: float = spec.norm.eps  # type: ignore[attr-defined]
        seen = seen / ((seen * seen).mean() + eps) ** 0.5 * weights["norm.weight"]
        e = (seen + spec.width**0.5 * weights["table"][0, : spec.width]) / 2**0.5
        rows.append(weights["down.weight"] @ (reference_activation(spec.act, weights["gate.weight"] @ row) * e))
    return torch.stack(rows)
