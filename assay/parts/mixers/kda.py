"""Kimi Delta Attention: a memory that replaces, and in which every channel of the keys forgets at its own pace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.precision import high
from assay.ops.scan.delta import delta_rule
from assay.ops.step import Step
from assay.parts.mixers._delta import DeltaMixer, DeltaSpec
from assay.spec.base import Cost, Fan, Init, Site, Weight


class Kda(DeltaSpec):
    """S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_(t-1) + beta_t k_t v_t^T, o_t = q_t S_t, a_t = exp(-A softplus(f + b)).

    Kimi Team 2025, arXiv 2510.26692, eqs. 1 and 10. f and the logit of the gate on a head's normed output are maps of
    the input through `rank` numbers; null is head_dim. One A a head, one b a channel. Initial values as for Mamba-2.
    """

    kind: Literal["kda"] = "kda"
    rank: int | None = Field(default=None, ge=1)

    def linears(self, site: Site) -> dict[str, Fan]:
        key, value = self.sizes(site)
        rank = key if self.rank is None else self.rank
        return super().linears(site) | {
            "decay_down": Fan(site.d_in, rank),
            "decay_up": Fan(rank, self.heads * key, split=0),
            "gate_down": Fan(site.d_in, rank),
            "gate_up": Fan(rank, self.heads * value, split=0),
        }

    def own(self, site: Site) -> dict[str, Weight]:
        shape = self.heads, self.sizes(site)[0]
        return super().own(site) | {
            "a_log": Weight((self.heads,), "vector", Init.between(1.0, 16.0, "log"), split=0),
            "dt_bias": Weight(shape, "vector", Init.between(1e-3, 1e-1, "softplus", log=True), split=0),
        }

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return self.counted(site, new, by_head=False)

    def build(self, site: Site) -> KdaMixer:
        return KdaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=8)
        yield cls(heads=4, head_dim=5, value_dim=3, rank=2, conv=3, negative=True, chunk=4)
        yield cls(heads=3, head_dim=6, conv=None, chunk=8)


class KdaMixer(DeltaMixer):
    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        *parts, beta, down, gate = self.made(x, step, "q", "k", "v", "beta", "decay_down", "gate_down")
        q, k, v = self.qkv(parts, step, here)
        f = high(self.decay_up(down, step)).unflatten(-1, (-1, k.shape[-1]))
        decay = -high(self.a_log).exp()[:, None] * F.softplus(f + high(self.dt_bias))
        mix = self.recall(delta_rule(q, k, v, self.rate(beta, step), step.table(self).lay(decay)), step, here)
        gate = torch.sigmoid(high(self.gate_up(gate, step)))
        return self.out(here.tap("mix", (mix * gate.view_as(mix)).to(x.dtype)).flatten(1), step)


def reference(spec: Kda, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""
    n, d_in = x.shape
    size = spec.head_dim or d_in // spec.heads
    wide, taps = spec.value_dim or size, spec.conv or 1
    streams = {}
    for name in ("q", "k", "v"):
        plain = [weights[f"{name}.weight"] @ row for row in x]
        filters = weights[f"{name}_conv"] if spec.conv else torch.ones(len(plain[0]), 1, dtype=x.dtype)
        rows = []
        for t in range(n):
            total = sum(filters[:, taps - 1 - back] * plain[t - back] for back in range(min(taps, t + 1)))
            rows.append(total / (1 + torch.exp(-total)))
        streams[name] = rows
    states = [torch.zeros(size, wide, dtype=x.dtype) for _ in range(spec.heads)]
    out = []
    for t in range(n):
        beta = (2 if spec.negative else 1) / (1 + torch.exp(-(weights["beta.weight"] @ x[t])))
        f = (weights["decay_up.weight"] @ (weights["decay_down.weight"] @ x[t])).view(spec.heads, size)
        gate = weights["gate_up.weight"] @ (weights["gate_down.weight"] @ x[t])
        heads = []
        for h in range(spec.heads):
            a = torch.exp(-torch.exp(weights["a_log"][h]) * torch.log1p(torch.exp(f[h] + weights["dt_bias"][h])))
            q, k = (streams[name][t][h * size : (h + 1) * size] for name in ("q", "k"))
            q, k, v = q / (q @ q + 1e-6) ** 0.5, k / (k @ k + 1e-6) ** 0.5, streams["v"][t][h * wide : (h + 1) * wide]
            turn = (torch.eye(size, dtype=x.dtype) - beta[h] * torch.outer(k, k)) @ torch.diag(a)
            states[h] = turn @ states[h] + beta[h] * torch.outer(k, v)
            o = q / size**0.5 @ states[h]
            o = o / ((o @ o) / wide + spec.norm.eps) ** 0.5 * weights["norm.weight"]  # type: ignore[attr-defined]
            heads.append(o / (1 + torch.exp(-gate[h * wide : (h + 1) * wide])))
        out.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(out)
