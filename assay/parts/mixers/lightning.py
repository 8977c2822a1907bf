"""Lightning attention: constant decays that get slower from layer to layer, on activated queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts._checks import token_by_token, whole_heads
from assay.parts.mixers._decayed import DecayedMixer
from assay.spec.base import Cost, Fan, MixerSpec, NormSpec, PartSpec, Site, StateField


class Lightning(MixerSpec):
    """out(sigmoid(x W_g) * norm(o)), o_t = q_t S_t, S_t = exp(-s_h) S_(t-1) + k_t v_t^T, with q, k, v = act(x W).

    MiniMax 2025, arXiv 2501.08313, section 2.2; Qin et al. 2024, arXiv 2401.04658. Head h of H (from 1) in layer l of L
    (from 0) has s_h = 2^(-8 h / H) (1 - l / (L - 1) + 1e-5): ALiBi's slopes, and next to no decay in the last layer.
    norm: over all heads together. chunk: tokens that are computed at once; it changes speed and not results.
    """

    kind: Literal["lightning"] = "lightning"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    act: Activation = "silu"
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)
    gate: bool = True
    chunk: int = Field(default=ops.CHUNK, ge=1)
    refuses = {"split": "the norm goes over all heads, and how fast a head forgets follows from its number"}

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def slopes(self, site: Site) -> list[float]:
        """Minus each head's log decay."""
        depth = 1 - site.layer / (site.layers - 1 + 1e-5) + 1e-5  # the constants are those of the published model
        return [2.0 ** (-8 * (h + 1) / self.heads) * depth for h in range(self.heads)]

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        token_by_token("norm", self.norm)

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.heads * self.size(site)
        table = {name: Fan(site.d_in, width, split=0) for name in ("q", "k", "v")}
        table |= {"gate_map": Fan(site.d_in, width, split=0)} if self.gate else {}
        return table | {"out": Fan(width, site.d_out, out=True, split=1)}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        width = self.heads * self.size(site)
        return {"norm": (self.norm, site.child("norm", width, width))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        k = self.size(site)
        return (StateField("s", "sequence", (self.heads, k, k), "float32", split=0),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        k = self.size(site)
        return ops.cost(new, self.heads, (k, k), self.heads, self.chunk)

    def build(self, site: Site) -> LightningMixer:
        return LightningMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=5)
        yield cls(heads=3, head_dim=4, act="gelu", gate=False, chunk=8)


class LightningMixer(DecayedMixer):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec = self.spec
        maps = {"q": self.q, "k": self.k, "v": self.v}
        made = {n: activate(spec.act, m(x, step)).unflatten(-1, (spec.heads, -1)) for n, m in maps.items()}
        high = torch.promote_types(x.dtype, torch.float32)
        decay = ops.constant(-torch.tensor(spec.slopes(self.site), device=x.device, dtype=high), step.table(self))
        mix = self.recall(made["q"], made["k"], made["v"], decay, step, here)
        y = self.norm(mix.flatten(1))
        return self.out(torch.sigmoid(self.gate_map(x, step)) * y if spec.gate else y, step)


def reference(spec: Lightning, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for the first of two layers: one sequence, one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    norm: Any = spec.norm
    state = [torch.zeros(d, d, dtype=x.dtype) for _ in range(spec.heads)]
    rows = []
    for row in x:
        q, k, v = (reference_activation(spec.act, weights[f"{n}.weight"] @ row) for n in ("q", "k", "v"))
        heads = []
        for h in range(spec.heads):
            part = slice(h * d, (h + 1) * d)
            slope = (1 / 2 ** (8 / spec.heads)) ** (h + 1) * (1 + 1e-5)
            state[h] = 2.718281828459045**-slope * state[h] + torch.outer(k[part], v[part])
            heads.append(q[part] @ state[h])
        y = torch.cat(heads)
        if norm.kind_name() == "layernorm":
            y = y - y.mean()
        y = y / ((y * y).mean() + norm.eps) ** 0.5 * weights["norm.weight"]
        y = y + weights.get("norm.bias", torch.zeros_like(y))
        if spec.gate:
            y = y / (1 + torch.exp(-(weights["gate_map.weight"] @ row)))
        rows.append(weights["out.weight"] @ y)
    return torch.stack(rows)
