"""Contextual positions: a query counts the keys that it finds worth counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops import attend as ops
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.step import Step, View
from assay.parts.mixers._rules import ScoreRule
from assay.parts.mixers.gqa import Gqa, GqaMixer
from assay.parts.mixers.relative_values import over, refuse_dropout
from assay.spec.base import Cost, Init, Site, Weight


class Cope(Gqa):
    """q_i . (k_j + e[p_ij]) with p_ij = sum_(j <= l <= i) sigmoid(q_i . k_l). Golovneva et al. 2024, arXiv 2405.18719.

    Section 3.1, eqs. 3 to 5, scaled as in its appendix's listing: q.k, of which the gates are, and not q.e. p counts
    the keys that the query sees; beyond `limit` - 1 it stays there, and between whole numbers e is interpolated. One
    table for the heads, at first 0. A mixer and no scheme: the counts of a row need all its logits and its mask, which
    no backend that cuts rows up has, so that the logits of all heads are held at once. The other fields are those of
    `gqa`; causal rules alone.
    """

    kind: Literal["cope"] = "cope"  # type: ignore[assignment]
    limit: int = Field(default=64, ge=2)

    def check(self, site: Site) -> None:
        super().check(site)
        refuse_dropout(self)
        if not self.sees.causal or self.sees.prefix:
            raise ValueError("`sees`: contextual positions count from a key to a later query; accepted: causal rules")
        if self.position is not None:
            raise ValueError(f"`position` is {self.position!r}; contextual positions stand alone: null is accepted")

    def pieces(self, site: Site) -> Mapping[str, int]:
        """Each head reads the one table."""
        return {}

    def own(self, site: Site) -> dict[str, Weight]:
        return super().own(site) | {"places": Weight((self.limit, self.size(site)), "vector", Init.constant(0.0))}

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """q k^T and p v for each pair, and each query with the table. Executed: the whole square, of what a window
        keeps."""
        size, told = self.size(site), 2 * self.heads * self.limit * self.size(site) * new
        kept = seen if self.sees.keep is None else min(seen, self.sees.keep)
        per_pair = 4 * self.heads * size
        return Cost(per_pair * self.sees.pairs(new, seen) + told, per_pair * new * (new + kept) + told)

    def build(self, site: Site) -> CopeMixer:
        return CopeMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(
            heads=4, kv_heads=2, head_dim=6, bias="all", limit=3, sees=Sees(window=5), scores=ScoreRule(sink=True)
        )
        yield cls(heads=2, limit=30, scores=ScoreRule(scale=0.3, softcap=2.0))


class CopeMixer(GqaMixer):
    """[N, D] -> [N, D]."""

    def mixed(self, q: Float[Tensor, "N H K"], view: View, step: Step, here: Here) -> Float[Tensor, "N H K"]:
        rule = self.rule(q)
        z = ops.logits(q, view, step, self.spec.sees, rule, step.table(self))  # [R, H, T, S]
        place = self.counted(torch.sigmoid(z), step, view).clamp(max=self.spec.limit - 1)
        asked = q.view(z.shape[0], -1, *q.shape[1:]).transpose(1, 2).to(z.dtype)
        told = asked @ self.places.to(z.dtype).T  # [R, H, T, limit]
        below = place.detach().floor()
        share, low = place - below, below.long()
        low_told, high_told = (told.gather(-1, n) for n in (low, (low + 1).clamp(max=self.spec.limit - 1)))
        return over(ops.softmax(z + low_told * (1 - share) + high_told * share, rule.sink), view, q)

    def counted(self, gates: Float[Tensor, "R H T S"], step: Step, view: View) -> Float[Tensor, "R H T S"]:
        """For each key the sum of the gates from it on. What is not seen has a gate of 0, and entries of a store
        need not stand in order."""
        index = ops.aligned(step, view.layout)[4]
        order = index.argsort(-1)
        back = order.argsort(-1)

        def along(x: Tensor, by: Tensor) -> Tensor:
            return x.gather(-1, by[:, None, None].expand(x.shape))

        return along(along(gates, order).flip(-1).cumsum(-1).flip(-1), back)


def reference(spec: Cope, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence: one token and one head at a time. Of the fields it knows `bias`, the window
    and the scores' scale, soft cap and sink; the rest is `gqa`'s own code."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    scale = d**-0.5 if spec.scores.scale is None else spec.scores.scale
    zero, cap, e = torch.zeros((), dtype=x.dtype), spec.scores.softcap, weights["places"]
    q, k, v = (x @ weights[f"{n}.weight"].T + weights.get(f"{n}.bias", zero) for n in "qkv")
    rows = []
    for i in range(x.shape[0]):
        seen = [j for j in range(i + 1) if spec.sees.window is None or i - j < spec.sees.window]
        heads = []
        for h in range(spec.heads):
            g, own = h // (spec.heads // spec.groups), q[i, h * d : (h + 1) * d]
            z = [scale * (own @ k[j, g * d : (g + 1) * d]) for j in seen]
            z = z if cap is None else [cap * torch.tanh(value / cap) for value in z]
            found = []
            for n in range(len(seen)):
                p = sum((1 / (1 + torch.exp(-value)) for value in z[n:]), zero)
                p = p if p < spec.limit - 1 else zero + spec.limit - 1
                low = int(p.detach())
                high = min(low + 1, spec.limit - 1)
                found.append(z[n] + own @ (e[low] * (1 - (p - low)) + e[high] * (p - low)))
            top = torch.stack(found).exp()
            share = top / (top.sum() + (weights["sink"][h].exp() if spec.scores.sink else 0.0))
            heads.append(torch.stack([share[n] * v[j, g * d : (g + 1) * d] for n, j in enumerate(seen)]).sum(0))
        rows.append(weights["out.weight"] @ torch.cat(heads) + weights.get("out.bias", zero))
    return torch.stack(rows)
