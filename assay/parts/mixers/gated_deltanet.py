"""Gated DeltaNet: a memory that replaces, and that forgets."""

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
from assay.ops.scan.decayed import steps
from assay.ops.scan.delta import delta_rule
from assay.ops.step import Step
from assay.parts.mixers._delta import DeltaMixer, DeltaSpec
from assay.spec.base import Cost, Fan, Init, Site, Weight


class GatedDeltaNet(DeltaSpec):
    """S_t = a_t (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, o_t = q_t S_t, a_t = exp(-A softplus(w x_t + b)).

    Yang et al. 2024, arXiv 2412.06464, eq. 10 and figure 1; the layer of Qwen3-Next. A head's output is normed and
    multiplied by SiLU of a map of the input. k_heads: heads of queries and keys, each serving equally many neighbouring
    heads of values; null is heads. A starts in (1, 16) and softplus(b) in (0.001, 0.1), as in Mamba-2.
    """

    kind: Literal["gated_deltanet"] = "gated_deltanet"
    k_heads: int | None = Field(default=None, ge=1)

    @property
    def key_heads(self) -> int:
        return self.heads if self.k_heads is None else self.k_heads

    def check(self, site: Site) -> None:
        super().check(site)
        if self.heads % self.key_heads:
            raise ValueError(f"`heads` ({self.heads}) is not a multiple of `k_heads` ({self.k_heads})")

    def linears(self, site: Site) -> dict[str, Fan]:
        wide = self.heads * self.sizes(site)[1]
        return super().linears(site) | {
            "decay": Fan(site.d_in, self.heads, split=0),
            "gate": Fan(site.d_in, wide, split=0),
        }

    def own(self, site: Site) -> dict[str, Weight]:
        return super().own(site) | {
            "a_log": Weight((self.heads,), "vector", Init.between(1.0, 16.0, "log"), split=0),
            "dt_bias": Weight((self.heads,), "vector", Init.between(1e-3, 1e-1, "softplus", log=True), split=0),
        }

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return self.counted(site, new, by_head=True)

    def build(self, site: Site) -> GatedDeltaNetMixer:
        return GatedDeltaNetMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=8)
        yield cls(heads=4, k_heads=2, head_dim=5, value_dim=3, conv=3, negative=True, chunk=5)
        yield cls(heads=3, k_heads=1, head_dim=6, conv=None, chunk=7)


class GatedDeltaNetMixer(DeltaMixer):
    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        *parts, beta, decay, gate = self.made(x, step, "q", "k", "v", "beta", "decay", "gate")
        q, k, v = self.qkv(parts, step, here)
        _, decay = steps(decay, self.dt_bias, self.a_log)
        mix = self.recall(delta_rule(q, k, v, self.rate(beta, step), step.table(self).lay(decay)), step, here)
        mix = (mix * F.silu(high(gate)).view_as(mix)).to(x.dtype)
        return self.out(here.tap("mix", mix).flatten(1), step)


def reference(spec: GatedDeltaNet, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""
    n, d_in = x.shape
    size = spec.head_dim or d_in // spec.heads
    wide, taps, share = spec.value_dim or size, spec.conv or 1, spec.heads // (spec.k_heads or spec.heads)

    def silu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-z))

    streams = {}
    for name in ("q", "k", "v"):
        plain = [weights[f"{name}.weight"] @ row for row in x]
        filters = weights[f"{name}_conv"] if spec.conv else torch.ones(len(plain[0]), 1, dtype=x.dtype)
        streams[name] = [
            silu(
                sum(
                    (filters[:, taps - 1 - back] * plain[t - back] for back in range(min(taps, t + 1))), x.new_zeros(())
                )
            )
            for t in range(n)
        ]
    states = [torch.zeros(size, wide, dtype=x.dtype) for _ in range(spec.heads)]
    out = []
    for t in range(n):
        beta = (2 if spec.negative else 1) / (1 + torch.exp(-(weights["beta.weight"] @ x[t])))
        a = torch.exp(
            -torch.exp(weights["a_log"]) * torch.log1p(torch.exp(weights["decay.weight"] @ x[t] + weights["dt_bias"]))
        )
        gate, heads = silu(weights["gate.weight"] @ x[t]), []
        for h in range(spec.heads):
            place = h // share * size
            q, k = (streams[name][t][place : place + size] for name in ("q", "k"))
            q, k, v = q / (q @ q + 1e-6) ** 0.5, k / (k @ k + 1e-6) ** 0.5, streams["v"][t][h * wide : (h + 1) * wide]
            turn = a[h] * (torch.eye(size, dtype=x.dtype) - beta[h] * torch.outer(k, k))
            states[h] = turn @ states[h] + beta[h] * torch.outer(k, v)
            o = q / size**0.5 @ states[h]
            o = o / ((o @ o) / wide + spec.norm.eps) ** 0.5 * weights["norm.weight"]  # type: ignore[attr-defined]
            heads.append(o * gate[h * wide : (h + 1) * wide])
        out.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(out)
