"""Gated linear attention: each channel of the keys forgets at a rate that the token chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts._checks import halved, token_by_token
from assay.parts.mixers._decayed import DecayedMixer, Retention
from assay.spec.base import Cost, Fan, NormSpec, Site


class Gla(Retention):
    """out(silu(x W_r) * norm_h(o)), o_t = q_t S_t, S_t = Diag(a_t) S_(t-1) + k_t v_t^T, with a decay for each channel
    of the keys, a = sigmoid(x W_1 W_2 + b)^(1/16).

    Yang et al. 2023, arXiv 2312.06635, sections 4.2 and 4.4; q is divided by sqrt(key_dim), as in the authors' code.
    key_dim, value_dim: of a head; null is d_model / (2 heads) and d_model / heads. rank: of W_1 W_2.
    temperature: the 16 of the exponent: the larger, the slower a channel forgets. norm: on each head's output.
    chunk: tokens that are computed at once, a power of two; it changes speed and not results.
    """

    kind: Literal["gla"] = "gla"
    key_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)
    rank: int = Field(default=16, ge=1)
    temperature: float = Field(default=16.0, gt=0.0)
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def key_size(self, site: Site) -> int:
        return self.key_dim if self.key_dim is not None else site.d_in // (2 * self.heads)

    def value_size(self, site: Site) -> int:
        return self.value_dim if self.value_dim is not None else site.d_in // self.heads

    def check(self, site: Site) -> None:
        for name, given, parts in (
            ("key_dim", self.key_dim, 2 * self.heads),
            ("value_dim", self.value_dim, self.heads),
        ):
            if given is None and site.d_in % parts:
                raise ValueError(
                    f"d_model ({site.d_in}) is not a multiple of {parts}, for {self.heads} heads; give `{name}`"
                )
        token_by_token("norm", self.norm)
        ops.power_of_two("chunk", self.chunk)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def linears(self, site: Site) -> dict[str, Fan]:
        keys = self.heads * self.key_size(site)
        maps = {"decay_down": Fan(site.d_in, self.rank), "decay_up": Fan(self.rank, keys, True, split=0)}
        return super().linears(site) | maps

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        sizes = (self.key_size(site), self.value_size(site))
        return ops.cost(new, self.heads, sizes, self.heads, self.chunk, channels=True)

    def build(self, site: Site) -> GlaMixer:
        return GlaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, rank=4, chunk=4)
        yield cls(heads=3, key_dim=4, value_dim=5, rank=3, temperature=0.5, gate=False, chunk=8)
        yield cls.model_validate({"heads": 2, "rank": 2, "norm": "layernorm", "chunk": 2})


class GlaMixer(DecayedMixer):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, size = self.spec, self.spec.key_size(self.site)
        q, k = (m(x, step).unflatten(-1, (-1, size)) for m in (self.q, self.k))
        v = self.v(x, step).unflatten(-1, (-1, spec.value_size(self.site)))
        rate = self.decay_up(self.decay_down(x, step), step)
        rate = F.logsigmoid(rate.to(torch.promote_types(x.dtype, torch.float32))) / spec.temperature
        decay = step.table(self).lay(rate.unflatten(-1, (-1, size)))
        return self.closed(self.recall(q * size**-0.5, k, v, decay, step, here), x, step)


def reference(spec: Gla, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""
    d = spec.key_dim if spec.key_dim is not None else x.shape[1] // (2 * spec.heads)
    e = spec.value_dim if spec.value_dim is not None else x.shape[1] // spec.heads
    norm: Any = spec.norm
    state = [torch.zeros(d, e, dtype=x.dtype) for _ in range(spec.heads)]
    rows = []
    for row in x:
        q, k, v = (weights[f"{n}.weight"] @ row for n in ("q", "k", "v"))
        rate = weights["decay_up.weight"] @ (weights["decay_down.weight"] @ row) + weights["decay_up.bias"]
        a = (1 / (1 + torch.exp(-rate))) ** (1 / spec.temperature)
        heads = []
        for h in range(spec.heads):
            keys, values = slice(h * d, (h + 1) * d), slice(h * e, (h + 1) * e)
            state[h] = a[keys, None] * state[h] + torch.outer(k[keys], v[values])
            o = q[keys] @ state[h] / d**0.5
            if norm.kind_name() == "layernorm":
                o = o - o.mean()
            o = o / ((o * o).mean() + norm.eps) ** 0.5 * weights["norm.weight"]
            heads.append(o + weights.get("norm.bias", torch.zeros_like(o)))
        y = torch.cat(heads)
        if spec.gate:
            g = weights["gate_map.weight"] @ row
            y = y * g / (1 + torch.exp(-g))
        rows.append(weights["out.weight"] @ y)
    return torch.stack(rows)
