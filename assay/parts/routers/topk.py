"""The top-k softmax router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts.base import Part
from assay.spec.base import Fan, RouterSpec, Site


class TopK(RouterSpec):
    """The k experts with the largest softmax(x W) and their shares. Shazeer et al. 2017, arXiv 1701.06538.

    renormalise: the k shares sum to one (Mixtral). balance: weight of the loss E * sum_e f_e P_e (Fedus et al. 2021,
    arXiv 2101.03961, eqs. 4-6), f the share of choices and P the mean probability. z: weight of the mean squared
    log-sum-exp of the router's logits (Zoph et al. 2022, arXiv 2202.08906, eq. 5).
    """

    kind: Literal["topk"] = "topk"
    k: int = Field(default=2, ge=1)
    renormalise: bool = True
    balance: float = Field(default=0.01, ge=0.0)
    z: float = Field(default=0.0, ge=0.0)

    def check(self, site: Site) -> None:
        if self.k > site.d_out:
            raise ValueError(f"`k` ({self.k}) is more than the {site.d_out} experts")

    def linears(self, site: Site) -> dict[str, Fan]:
        return {"map": Fan(site.d_in, site.d_out)}

    def build(self, site: Site) -> TopKRouter:
        return TopKRouter(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(k=2)
        yield cls(k=1, renormalise=False, balance=0.1, z=0.01)


class TopKRouter(Part):
    """[N, D] -> choice [N, k] and share [N, k]. Taps router.logits, router.choice, stat.load, loss.balance, loss.z."""

    def forward(
        self, x: Float[Tensor, "N D"], step: Step, here: Here
    ) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k"]]:
        logits = here.tap("logits", self.map(x, step).to(torch.promote_types(x.dtype, torch.float32)))
        shares = torch.softmax(logits, -1)
        share, choice = shares.topk(self.spec.k, -1)
        here.tap("choice", choice)
        if self.training:
            self.statistics(logits, shares, choice, step, here)
        if self.spec.renormalise:
            share = share / share.sum(-1, keepdim=True)
        return choice, share.to(x.dtype)

    def statistics(self, logits: Tensor, shares: Tensor, choice: Tensor, step: Step, here: Here) -> None:
        """Means over the real tokens; padding routes somewhere but is counted nowhere."""
        real = (step.seq >= 0).to(logits.dtype)[:, None]
        count = real.sum().clamp(min=1.0)
        load = (torch.zeros_like(shares).scatter(1, choice, 1.0) * real).sum(0)
        here.add("stat.load", load.detach())
        if self.spec.balance:
            frequency, mean = load.detach() / (count * self.spec.k), (shares * real).sum(0) / count
            here.add("loss.balance", self.spec.balance * shares.shape[1] * (frequency * mean).sum())
        if self.spec.z:
            z = torch.logsumexp(logits, -1, keepdim=True).square()
            here.add("loss.z", self.spec.z * (z * real).sum() / count)


def reference(spec: TopK, weights: dict[str, Tensor], x: Tensor) -> list[list[tuple[int, float]]]:
    """For each token of [N, D] (float64) its experts and shares, largest first."""
    out = []
    for row in x:
        raw = (weights["map.weight"] @ row).exp()
        shares = sorted(((float(v / raw.sum()), -e) for e, v in enumerate(raw)), reverse=True)[: spec.k]
        total = sum(s for s, _ in shares) if spec.renormalise else 1.0
        out.append([(-e, s / total) for s, e in shares])
    return out
