"""Product-key memory: a large table of values, of which each token reads a few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Ffn
from assay.spec.base import Cost, Fan, FfnSpec, Init, NormSpec, PartSpec, Site, Weight


class ProductKeys(FfnSpec):
    """sum over the `top` best of keys^2 keys of softmax(q . k) v, for each of `heads` queries. Lample et al. 2019,
    arXiv 1907.05242, section 3.

    A key is a pair of half keys, `keys` of each half, so that the best pairs are found among the best of each half: no
    key of keys^2 is ever made. The values are one table for all heads. norm: on the queries, token by token, where the
    paper normalises over the batch; null is none.
    """

    kind: Literal["product_keys"] = "product_keys"
    keys: int = Field(ge=2)
    heads: int = Field(default=4, ge=1)
    top: int = Field(default=8, ge=1)
    key_dim: int = Field(default=32, ge=2)
    norm: NormSpec | None = Field(default="layernorm", validate_default=True)

    def check(self, site: Site) -> None:
        if self.key_dim % 2:
            raise ValueError(f"`key_dim` is {self.key_dim}; a key has two halves: an even number is accepted")
        if self.top > self.keys:
            raise ValueError(f"`top` ({self.top}) is more than the {self.keys} half keys (`keys`) it is chosen from")
        token_by_token("norm", self.norm)

    def linears(self, site: Site) -> dict[str, Fan]:
        return {"query": Fan(site.d_in, self.heads * self.key_dim)}

    def own(self, site: Site) -> dict[str, Weight]:
        half, table = self.key_dim // 2, self.keys**2
        drawn, read = Init.fan_in(site.d_out), min(1.0, self.heads * self.top / table)
        return {
            "half_keys": Weight((self.heads, 2, self.keys, half), "matrix", Init("uniform", half**-0.5)),
            "values": Weight((table, site.d_out), "embed", drawn, active=read),
        }

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", self.key_dim, self.key_dim))}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The values that are read, weighted and added."""
        return Cost(2 * self.heads * self.top * site.d_out * new)

    def build(self, site: Site) -> ProductKeysFfn:
        return ProductKeysFfn(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(keys=5, heads=2, top=3, key_dim=8)
        yield cls(keys=4, heads=1, top=4, key_dim=6, norm=None)


class ProductKeysFfn(Ffn):
    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        q = self.query(x, step).unflatten(-1, (self.spec.heads, -1))
        q = q if self.spec.norm is None else self.norm(q, step)
        score, index = self.best(q)
        read = F.embedding(here.tap("read", index), self.values)  # [N, heads, top, D]
        return (torch.softmax(score, -1)[..., None] * read).sum((1, 2))

    def best(self, q: Float[Tensor, "N H K"]) -> tuple[Tensor, Tensor]:
        """Scores and numbers [N, H, top] of the best keys: those of a pair of halves are first * keys + second."""
        spec = self.spec
        found, half = torch.einsum("nhsk,hsmk->nhsm", q.unflatten(-1, (2, -1)), self.half_keys).topk(spec.top, -1)
        pairs = found[:, :, 0, :, None] + found[:, :, 1, None]  # the best pair of halves is a pair of best halves
        numbers = half[:, :, 0, :, None] * spec.keys + half[:, :, 1, None]
        score, place = pairs.flatten(2).topk(spec.top, -1)
        return score, numbers.flatten(2).gather(-1, place)


def reference(spec: ProductKeys, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one token and one head at a time, over all keys^2 keys. The norm is a layer norm or none."""
    half, rows = spec.key_dim // 2, []
    for row in x:
        total = torch.zeros_like(row)
        for h, q in enumerate((weights["query.weight"] @ row).split(spec.key_dim)):
            if spec.norm is not None:
                eps: float = spec.norm.eps  # type: ignore[attr-defined]
                q = (q - q.mean()) / (((q - q.mean()) ** 2).mean() + eps) ** 0.5
                q = q * weights["norm.weight"] + weights["norm.bias"]
            first, second = weights["half_keys"][h]
            z = torch.stack([q[:half] @ a + q[half:] @ b for a in first for b in second])
            best = sorted(range(len(z)), key=lambda n: -float(z[n].detach()))[: spec.top]
            e = z[best].exp()
            total = total + (e / e.sum()) @ weights["values"][best]
        rows.append(total)
    return torch.stack(rows)
