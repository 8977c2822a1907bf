"""The top-k router: scores, groups, biases that only select, and what keeps the load even."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from assay.ops.here import Here
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.base import Part
from assay.spec.base import Fan, Init, NormSpec, PartSpec, RouterSpec, Site, Spec, Weight


class Groups(Spec):
    """The experts in `count` groups of neighbours, of which only the best `top` are open to a token.

    score: a group counts by its best expert (`max`, DeepSeek-V2, arXiv 2405.04434, section 2.2.2) or by the sum of its
    best two (`top2`, DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    count: int = Field(ge=2)
    top: int = Field(ge=1)
    score: Literal["top2", "max"] = "top2"

    def check(self, experts: int, k: int) -> None:
        if experts % self.count:
            raise ValueError(f"`groups.count` ({self.count}) does not divide the {experts} experts")
        if self.top > self.count:
            raise ValueError(f"`groups.top` ({self.top}) is more than the {self.count} groups")
        if k > self.top * (experts // self.count):
            raise ValueError(f"`k` ({k}) is more than the {experts // self.count} experts in each of {self.top} groups")
        if self.score == "top2" and experts // self.count < 2:
            raise ValueError("`groups.score: top2` needs groups of two experts or more; accepted here: max")


class SelectBias(Spec):
    """A bias an expert that moves the choice and not the shares. After each optimiser step an expert that had less
    than the mean load gains `rate` and one that had more loses it. Wang et al. 2024, arXiv 2408.15664, algorithm 1."""

    rate: float = Field(default=0.001, ge=0.0)


class TopK(RouterSpec):
    """The k experts with the largest scores and their shares. Shazeer et al. 2017, arXiv 1701.06538.

    score: softmax over all experts, or a sigmoid of each. renormalise: the k shares sum to one (Mixtral); with softmax
    that is the softmax over the chosen logits alone (gpt-oss). scale: multiplies the shares. expert_gain: so does
    a learned number for each (Gemma 4). bias: of the linear map. norm: of what the router reads. select_bias: `true` is
    the usual rate. balance: weight of the loss E * sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eqs. 4-6), f the
    share of choices and P the mean of the scores as probabilities. z: weight of the mean squared log-sum-exp of the
    logits (Zoph et al. 2022, arXiv 2202.08906, eq. 5).
    """

    kind: Literal["topk"] = "topk"
    k: int = Field(default=2, ge=1)
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = Field(default=1.0, gt=0.0)
    expert_gain: bool = False
    bias: bool = False
    norm: NormSpec | None = None
    groups: Groups | None = None
    select_bias: SelectBias | None = None
    balance: float = Field(default=0.01, ge=0.0)
    z: float = Field(default=0.0, ge=0.0)

    @field_validator("select_bias", mode="before")
    @classmethod
    def _usual_rate(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    def check(self, site: Site) -> None:
        if self.k > site.d_out:
            raise ValueError(f"`k` ({self.k}) is more than the {site.d_out} experts")
        if self.groups is not None:
            self.groups.check(site.d_out, self.k)
        token_by_token("norm", self.norm)

    def linears(self, site: Site) -> dict[str, Fan]:
        return {"map": Fan(site.d_in, site.d_out, self.bias)}

    def own(self, site: Site) -> dict[str, Weight]:
        names = {"expert_gain": 1.0} if self.expert_gain else {}
        names |= {"select_bias": 0.0} if self.select_bias is not None else {}
        return {name: Weight((site.d_out,), "vector", Init.constant(value)) for name, value in names.items()}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        return {} if self.norm is None else {"norm": (self.norm, site.child("norm", site.d_in, site.d_in))}

    def build(self, site: Site) -> TopKRouter:
        return TopKRouter(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(k=2)
        yield cls(k=1, renormalise=False, balance=0.1, z=0.01)
        yield cls(k=2, score="sigmoid", groups=Groups(count=3, top=2), select_bias=SelectBias(), scale=2.5)
        yield cls.model_validate({"k": 2, "norm": "rmsnorm", "expert_gain": True, "bias": True})


class TopKRouter(Part):
    """[N, D] -> choice [N, k] and share [N, k]. Taps logits, choice, share, stat.load, loss.balance and loss.z."""

    def __init__(self, spec: TopK, site: Site) -> None:
        super().__init__(spec, site)
        if spec.select_bias is not None:
            self.select_bias.requires_grad_(False)

    def forward(
        self, x: Float[Tensor, "N D"], step: Step, here: Here
    ) -> tuple[Int[Tensor, "N k"], Float[Tensor, "N k"]]:
        read = x if self.spec.norm is None else self.norm(x, step)
        logits = here.tap("logits", self.map(read, step).to(torch.promote_types(x.dtype, torch.float32)))
        scores = torch.softmax(logits, -1) if self.spec.score == "softmax" else torch.sigmoid(logits)
        choice = here.tap("choice", self.chosen(scores.detach()))
        if self.training:
            self.statistics(logits, scores, choice, step, here)
        share = scores.gather(-1, choice)
        if self.spec.renormalise:
            # Sigmoids may all be zero in float32.
            share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        share = share * self.spec.scale if self.spec.scale != 1.0 else share
        share = share * self.expert_gain[choice] if self.spec.expert_gain else share
        return choice, here.tap("share", share.to(x.dtype))

    def chosen(self, scores: Float[Tensor, "N E"]) -> Int[Tensor, "N k"]:
        """The k best experts of each token, best first."""
        if self.spec.select_bias is not None:
            scores = scores + self.select_bias
        if self.spec.groups is not None:
            rule = self.spec.groups
            grouped = scores.unflatten(-1, (rule.count, -1))
            worth = grouped.topk(2 if rule.score == "top2" else 1, -1).values.sum(-1)
            closed = torch.ones_like(worth, dtype=torch.bool).scatter(-1, worth.topk(rule.top, -1).indices, False)
            scores = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.spec.k, -1).indices

    def statistics(self, logits: Tensor, scores: Tensor, choice: Tensor, step: Step, here: Here) -> None:
        """Means over the real tokens; padding routes somewhere but is counted nowhere."""
        real = (step.seq >= 0).to(logits.dtype)[:, None]
        count = step.total(real.sum()).clamp(min=1.0)
        load = (torch.zeros_like(scores).scatter(1, choice, 1.0) * real).sum(0)
        here.add("stat.load", load.detach())
        if self.spec.balance:
            shares = scores if self.spec.score == "softmax" else scores / scores.sum(-1, keepdim=True)
            frequency = step.total(load.detach()) / (count * self.spec.k)
            mean = step.total((shares * real).sum(0)) / count
            here.add("loss.balance", self.spec.balance * shares.shape[1] * (frequency * mean).sum())
        if self.spec.z:
            z = torch.logsumexp(logits, -1, keepdim=True).square()
            here.add("loss.z", self.spec.z * step.total((z * real).sum()) / count)

    @torch.no_grad()
    def after(self, taps: Mapping[str, Tensor]) -> None:
        """Moves the selection bias by the load of the step."""
        if self.spec.select_bias is not None and (load := taps.get("stat.load")) is not None:
            self.select_bias.add_(torch.sign(load.mean() - load), alpha=self.spec.select_bias.rate)


def reference(spec: TopK, weights: dict[str, Tensor], x: Tensor) -> list[list[tuple[int, Tensor]]]:
    """For each token of [N, D] (float64) its experts and shares, best first."""
    out = []
    for row in x:
        if spec.norm is not None:
            eps: float = spec.norm.eps  # type: ignore[attr-defined]
            row = row / ((row * row).mean() + eps) ** 0.5 * weights.get("norm.weight", torch.ones_like(row))
        raw = weights["map.weight"] @ row
        raw = raw + weights["map.bias"] if spec.bias else raw
        scores = raw.exp() / raw.exp().sum() if spec.score == "softmax" else 1 / (1 + torch.exp(-raw))
        worth = scores.tolist()
        if spec.select_bias is not None:
            worth = [w + b for w, b in zip(worth, weights["select_bias"].tolist(), strict=True)]
        if spec.groups is not None:
            size, best = len(worth) // spec.groups.count, 2 if spec.groups.score == "top2" else 1
            totals = [sum(sorted(worth[g * size : (g + 1) * size])[-best:]) for g in range(spec.groups.count)]
            opened = sorted(range(spec.groups.count), key=lambda g: -totals[g])[: spec.groups.top]
            worth = [w if e // size in opened else float("-inf") for e, w in enumerate(worth)]
        chosen = sorted(range(len(worth)), key=lambda e: (-worth[e], e))[: spec.k]
        total = sum(scores[e] for e in chosen) if spec.renormalise else 1.0
        gain = weights["expert_gain"] if spec.expert_gain else torch.ones_like(scores)
        out.append([(e, scores[e] / total * spec.scale * gain[e]) for e in chosen])
    return out
