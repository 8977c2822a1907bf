"""The lightning indexer of DeepSeek sparse attention.

Legend: N tokens, R x T rows and columns of the grid, S entries of the view, I index heads of K dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from assay.ops.attend import softmax
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.step import Step, View
from assay.parts._checks import token_by_token
from assay.parts.base import Selector, Turn
from assay.parts.norms.layernorm import LayerNorm
from assay.spec.base import Cost, Fan, NormSpec, PartSpec, SelectorSpec, Site, StateField

CAUSAL = Sees()


class Indexer(SelectorSpec):
    """The `keep` keys with the largest sums of w * relu(q k) over the heads. DeepSeek-AI 2025, arXiv 2512.02556, eq. 1.

    One key of `head_dim` dimensions a token serves all heads; it is normed, and kept. Its leading dimensions are turned
    as the mixer's are. Of equal sums the earlier key is chosen.

    A choice has no gradient, so these weights learn by a loss of their own: `align` times the Kullback-Leibler
    divergence of the softmax of the sums from the attention of all heads together, over the keys that are attended to
    (section 2.1.1, equations 3 and 4; with a `keep` that nothing exceeds it is the dense warm-up). Its gradient goes to
    the indexer alone. In this softmax the sums are divided by sqrt(heads head_dim), as in the released code;
    what the loss itself costs is no part of the bill. 0: the weights come trained from elsewhere, or stay as they are.
    """

    kind: Literal["indexer"] = "indexer"
    heads: int = Field(default=64, ge=1)
    head_dim: int = Field(default=128, ge=1)
    keep: int = Field(default=2048, ge=1)
    norm: NormSpec = Field(default={"kind": "layernorm", "eps": 1e-6}, validate_default=True)
    align: float = Field(default=0.0, ge=0.0)

    def check(self, site: Site) -> None:
        token_by_token("norm", self.norm)

    def turns(self, dim: int) -> None:
        if self.head_dim < dim:
            raise ValueError(f"`select.head_dim` is {self.head_dim}, of which the mixer turns {dim}")

    def narrows(self, entries: int) -> bool:
        return entries > self.keep

    def pairs(self, new: int, seen: int) -> int:
        """A token at place i sees i + 1 keys or `keep`, whichever is less."""
        growing = max(0, min(seen + new, self.keep) - seen)
        return growing * seen + growing * (growing + 1) // 2 + (new - growing) * self.keep

    def linears(self, site: Site) -> dict[str, Fan]:
        return {
            "q": Fan(site.d_out, self.heads * self.head_dim),
            "k": Fan(site.d_in, self.head_dim),
            "weigh": Fan(site.d_in, self.heads),
        }

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {"k_norm": (self.norm, site.child("k_norm", self.head_dim, self.head_dim))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("index", "token", (self.head_dim,)),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """q k and the weighted sum for each pair, none where every key would be chosen. Executed: the whole square."""
        each = 2 * self.heads * (self.head_dim + 1) if self.narrows(new + seen) else 0
        return Cost(each * CAUSAL.pairs(new, seen), each * new * (new + seen))

    def build(self, site: Site) -> IndexerSelector:
        return IndexerSelector(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=3, head_dim=6, keep=4, align=0.5)
        yield cls(heads=2, head_dim=5, keep=1, norm=LayerNorm(eps=1e-2))


class IndexerSelector(Selector):
    def read(
        self, x: Float[Tensor, "N D"], queries: Float[Tensor, "N C"], step: Step, turn: Turn
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        x, queries = x.detach(), queries.detach()
        q = self.q(queries, step).unflatten(-1, (self.spec.heads, -1))
        q, k = turn(q, self.k_norm(self.k(x, step))[:, None])
        return (q, self.weigh(x, step)), {"index": k[:, 0]}

    @torch.no_grad()
    def choose(self, asked: tuple[Tensor, ...], view: View, seen: Bool[Tensor, "R T S"]) -> Bool[Tensor, "R T S"]:
        scores = self.scores(asked, view, seen).masked_fill(~seen, float("-inf"))
        # A stable sort and not `topk`, whose choice among equals depends on the shape: many sums of relus are 0.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.spec.keep]
        return torch.zeros_like(seen).scatter_(-1, best, True) & seen

    def learn(self, asked: tuple[Tensor, ...], view: View, logits: Float[Tensor, "R H T S"], here: Here) -> None:
        """Publish `loss.align`, the mean over the tokens. logits: those of the mixer, -inf where it does not look."""
        if self.spec.align:
            here.add("loss.align", self.spec.align * self.divergence(asked, view, logits.detach()))

    def divergence(self, asked: tuple[Tensor, ...], view: View, logits: Float[Tensor, "R H T S"]) -> Float[Tensor, ""]:
        """Nats a token, of those that see something: KL(p || softmax(sums)), p the mean of the heads' attention."""
        p, seen = softmax(logits, None).mean(1), logits[:, 0] > float("-inf")
        sums = self.scores(asked, view, seen) * (self.spec.heads * self.spec.head_dim) ** -0.5
        # A token that sees nothing looks everywhere, so that nothing is divided by 0, and is counted nowhere.
        alive = seen.any(-1)
        guess = torch.log_softmax(sums.masked_fill(~seen & alive[..., None], float("-inf")), -1).masked_fill(~seen, 0.0)
        each = (torch.xlogy(p, p) - p * guess).sum(-1)
        return each.masked_fill(~alive, 0.0).sum() / alive.sum().clamp(min=1)

    def scores(self, asked: tuple[Tensor, ...], view: View, seen: Bool[Tensor, "R T S"]) -> Float[Tensor, "R T S"]:
        """In float32 or better: near ties decide what is seen."""
        (rows, tokens, entries), high = seen.shape, torch.promote_types(asked[0].dtype, torch.float32)
        q, weight = (t.to(high).view(rows, tokens, self.spec.heads, -1) for t in asked)
        k = view.dense("index").to(high).reshape(rows, entries, -1)
        z = F.relu(q.flatten(1, 2) @ k.mT).view(rows, tokens, self.spec.heads, entries)
        return (weight.mT @ z)[:, :, 0]


def reference(spec: Indexer, weights: dict[str, Tensor], x: Tensor, queries: Tensor, i: int) -> list[int]:
    """The places that token i of one sequence [N, D] attends to, without a position scheme; `queries` [C] is what its
    queries are made of."""
    weights, x, queries = {name: w.detach() for name, w in weights.items()}, x.detach(), queries.detach()
    heads = (weights["q.weight"] @ queries).view(spec.heads, spec.head_dim)
    share = weights["weigh.weight"] @ x[i]
    scores = []
    for row in x[: i + 1]:
        k = weights["k.weight"] @ row
        k = k - k.mean()
        k = k / ((k * k).mean() + spec.norm.eps) ** 0.5  # type: ignore[attr-defined]
        k = k * weights["k_norm.weight"] + weights["k_norm.bias"]
        scores.append(sum(float(w) * max(0.0, float(q @ k)) for w, q in zip(share, heads, strict=True)))
    return sorted(sorted(range(i + 1), key=lambda j: -scores[j])[: spec.keep])
