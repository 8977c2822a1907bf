"""Retention: linear attention whose heads forget at constant rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.lanes import Lanes
from assay.ops.scan import decayed as ops
from assay.ops.state import State
from assay.ops.step import Step
from assay.parts._checks import token_by_token, whole_heads
from assay.parts.base import Placed
from assay.parts.mixers._decayed import DecayedMixer, Retention
from assay.spec.base import Cost, NormSpec, PositionSpec, Site


class RetNet(Retention):
    """out(silu(x W_g) * norm_h(o)), o_t = q_t S_t, S_t = gamma_h S_(t-1) + k_t v_t^T, gamma_h = 1 - 2^(-5-h).

    Sun et al. 2023, arXiv 2307.08621, eqs. 1-8; k is divided by sqrt(head_dim).
    head_dim: of queries and keys; null is d_model / heads. value_dim: null is 2 head_dim, as in the paper.
    position: the name of a RoPE of the stack: with the decay it is the paper's xPos. norm: on each head's output.
    chunk: tokens that are computed at once; it changes speed and not results.
    """

    kind: Literal["retnet"] = "retnet"
    head_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)
    position: str | None = None
    norm: NormSpec = Field(default={"kind": "layernorm", "weight": False, "bias": False}, validate_default=True)

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def key_size(self, site: Site) -> int:
        return self.size(site)

    def value_size(self, site: Site) -> int:
        return self.value_dim if self.value_dim is not None else 2 * self.size(site)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        token_by_token("norm", self.norm)

    def meets(self, scheme: PositionSpec, site: Site) -> None:
        if scheme.kind_name() != "rope" or scheme.reads:
            raise ValueError(
                f"`position` {self.position!r}: a state has no scores to add to and no keys to turn later; "
                "accepted: null, or a scheme of kind rope with `turns: write`"
            )
        scheme.fits(self.heads, self.size(site))

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        sizes = (self.size(site), self.value_size(site))
        return ops.cost(new, self.heads, sizes, self.heads, self.chunk)

    def build(self, site: Site) -> RetNetMixer:
        return RetNetMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=5)
        yield cls.model_validate({"heads": 4, "head_dim": 3, "value_dim": 5, "norm": "rmsnorm", "chunk": 8})
        yield cls(heads=2, gate=False, chunk=4)


class RetNetMixer(Placed, DecayedMixer):
    """[N, D] -> [N, D]."""

    def prepare(self, step: Step, state: State | None) -> Lanes:
        self.check_bound()
        return super().prepare(step, state)

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, size = self.spec, self.spec.size(self.site)
        q, k = (m(x, step).unflatten(-1, (-1, size)) for m in (self.q, self.k))
        if self.scheme:
            q, k = self.scheme[0].on_qk(q, k, step)
        v = self.v(x, step).unflatten(-1, (-1, spec.value_size(self.site)))
        numbers = torch.arange(q.shape[-2], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        numbers = numbers + self.piece[0] * q.shape[-2]  # among all heads
        decay = ops.constant(torch.log1p(-torch.exp2(-5 - numbers)), step.table(self))
        return self.closed(self.recall(q, k * size**-0.5, v, decay, step, here), x, step)


def reference(spec: RetNet, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 without a position scheme: one sequence, one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    e = spec.value_dim if spec.value_dim is not None else 2 * d
    norm: Any = spec.norm
    state = [torch.zeros(d, e, dtype=x.dtype) for _ in range(spec.heads)]
    rows = []
    for row in x:
        q, k, v = (weights[f"{n}.weight"] @ row for n in ("q", "k", "v"))
        heads = []
        for h in range(spec.heads):
            keys, values = slice(h * d, (h + 1) * d), slice(h * e, (h + 1) * e)
            state[h] = (1 - 2.0 ** (-5 - h)) * state[h] + torch.outer(k[keys] / d**0.5, v[values])
            o = q[keys] @ state[h]
            if norm.kind_name() == "layernorm":
                o = o - o.mean()
            heads.append(o / ((o * o).mean() + norm.eps) ** 0.5 * weights.get("norm.weight", torch.ones_like(o)))
        y = torch.cat(heads)
        if spec.gate:
            g = weights["gate_map.weight"] @ row
            y = y * g / (1 + torch.exp(-g))
        rows.append(weights["out.weight"] @ y)
    return torch.stack(rows)
