"""DeltaNet: a memory that replaces what a key had stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan.delta import delta_rule
from assay.ops.step import Step
from assay.parts.mixers._delta import DeltaMixer, DeltaSpec
from assay.spec.base import Cost, Site


class DeltaNet(DeltaSpec):
    """S_t = (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, o_t = q_t S_t, beta_t = sigmoid(w x_t).

    Schlag et al. 2021, arXiv 2102.11174, eq. 23; in chunks and with its present layer Yang et al. 2024, arXiv
    2406.06484, sections 3 and 3.4. steps: updates a token, each with a key, a value and a beta of its own, which makes
    the transition a product of as many Householder matrices (DeltaProduct, Siems et al. 2025, arXiv 2502.10297, eq. 4).
    """

    kind: Literal["deltanet"] = "deltanet"
    steps: int = Field(default=1, ge=1)

    @property
    def rounds(self) -> int:
        return self.steps

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        return self.counted(site, new, by_head=True)

    def build(self, site: Site) -> DeltaNetMixer:
        return DeltaNetMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=8)
        yield cls(heads=3, head_dim=5, value_dim=4, conv=None, negative=True, chunk=3)
        yield cls(heads=4, head_dim=6, conv=3, steps=2, chunk=7)


class DeltaNetMixer(DeltaMixer):
    """A round is a token of its own to the recurrence, and what is asked is answered in the last one."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        rounds = self.spec.steps
        *parts, beta = self.made(x, step, "q", "k", "v", "beta")
        q, k, v = self.qkv(parts, step, here)
        asked = F.pad(q[:, :, None], (0, 0, 0, 0, rounds - 1, 0)).flatten(1, 2)
        k, v, beta = (apart(z, rounds) for z in (k, v, self.rate(beta, step)[..., None]))
        mix = self.recall(delta_rule(asked, k, v, beta[..., 0]), step, here)
        return self.out(here.tap("mix", mix.to(x.dtype)).flatten(1), step)


def apart(x: Float[Tensor, "L T HR C"], rounds: int) -> Float[Tensor, "L TR H C"]:
    """The rounds of each head one after another in time."""
    return x.unflatten(2, (-1, rounds)).transpose(2, 3).flatten(1, 2)


def reference(spec: DeltaNet, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token, one head and one round at a time."""
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
        heads = []
        for h in range(spec.heads):
            for j in range(h * spec.steps, (h + 1) * spec.steps):
                k, v = streams["k"][t][j * size : (j + 1) * size], streams["v"][t][j * wide : (j + 1) * wide]
                k = k / (k @ k + 1e-6) ** 0.5
                turn = torch.eye(size, dtype=x.dtype) - beta[j] * torch.outer(k, k)
                states[h] = turn @ states[h] + beta[j] * torch.outer(k, v)
            q = streams["q"][t][h * size : (h + 1) * size]
            o = q / (q @ q + 1e-6) ** 0.5 / size**0.5 @ states[h]
            heads.append(o / ((o @ o) / wide + spec.norm.eps) ** 0.5 * weights["norm.weight"])  # type: ignore[attr-defined]
        out.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(out)
