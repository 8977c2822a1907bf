"""Linear attention: a state of fixed size for each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan import additive
from assay.ops.step import Step
from assay.parts.base import Mixer
from assay.spec.base import Cost, Fan, MixerSpec, Site, StateField


class LinearAttention(MixerSpec):
    """Causal attention with kernel features: o_i = phi(q_i) S_i / (phi(q_i) z_i), S_i = sum_{j<=i} phi(k_j) v_j^T.

    Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 16-20, with phi(x) = elu(x) + 1. `normalise: false` leaves out z.
    """

    kind: Literal["linear"] = "linear"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    normalise: bool = True

    def refusals(self) -> Mapping[str, str]:
        return {"split": f"{self.heads} heads are not cut in two"} if self.heads % 2 else {}

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def check(self, site: Site) -> None:
        if self.head_dim is None and site.d_in % self.heads:
            raise ValueError(f"d_model ({site.d_in}) is not a multiple of `heads` ({self.heads}); give `head_dim`")

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.heads * self.size(site)
        table = {name: Fan(site.d_in, width, split=0) for name in ("q", "k", "v")}
        return table | {"out": Fan(width, site.d_out, out=True, split=1)}

    def state(self, site: Site) -> tuple[StateField, ...]:
        k = self.size(site)
        fields = [StateField("s", "sequence", (self.heads, k, k), "float32", split=0)]
        if self.normalise:
            fields.append(StateField("z", "sequence", (self.heads, k), "float32", split=0))
        return tuple(fields)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The recurrence: k v^T and q S a token, and q.z where it normalises. Executed: the quadratic form, and for
        one token the product with the state (the outer product that updates it is elementwise)."""
        k = self.size(site)
        per_token = 4 * self.heads * k * k + (2 * self.heads * k if self.normalise else 0)
        columns = k + 1 if self.normalise else k
        executed = 2 * self.heads * (k * columns if new == 1 else (k + columns) * new * new)
        return Cost(per_token * new, executed)

    def build(self, site: Site) -> LinearMixer:
        return LinearMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2)
        yield cls(heads=3, head_dim=5, normalise=False)


class LinearMixer(Mixer):
    """[N, D] -> [N, D]. The normaliser is one more value column of ones, so state and output are one recurrence."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        size = self.spec.size(self.site)
        q, k, v = (m(x, step).unflatten(-1, (-1, size)) for m in (self.q, self.k, self.v))
        q, k = (torch.nn.functional.elu(here.tap(n, t)) + 1 for n, t in (("q", q), ("k", k)))
        past = here.state.load("s", step).read()
        if self.spec.normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
            past = torch.cat([past, here.state.load("z", step).read()[..., None]], -1)
        mix, end = additive(q, k, v, past, step, keeps=here.state.keeps)
        if end is not None:
            here.state.store(step, s=end[..., :size], **({"z": end[..., size]} if self.spec.normalise else {}))
        if self.spec.normalise:
            mix = mix[..., :size] / mix[..., size:].clamp(min=torch.finfo(mix.dtype).tiny)
        return self.out(here.tap("mix", mix).flatten(1), step)


def reference(spec: LinearAttention, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    state = [torch.zeros(d, d, dtype=x.dtype) for _ in range(spec.heads)]
    total = [torch.zeros(d, dtype=x.dtype) for _ in range(spec.heads)]
    rows = []
    for row in x:
        q, k, v = (weights[f"{n}.weight"] @ row for n in ("q", "k", "v"))
        heads = []
        for h in range(spec.heads):
            part = slice(h * d, (h + 1) * d)
            phi_q, phi_k = (torch.where(t > 0, t + 1, torch.exp(t)) for t in (q[part], k[part]))
            state[h] = state[h] + torch.outer(phi_k, v[part])
            total[h] = total[h] + phi_k
            heads.append(phi_q @ state[h] / (phi_q @ total[h] if spec.normalise else 1.0))
        rows.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(rows)
