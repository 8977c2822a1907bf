"""Cross-attention: queries from the stream, keys and values from a memory that is stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops import attend as ops
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.state import State
from assay.ops.step import Step
from assay.parts._checks import halved, whole_heads
from assay.parts.base import Mixer
from assay.spec.base import Cost, Fan, MixerSpec, Site, StateField

ALL = Sees(causal=False)


class Cross(MixerSpec):
    """softmax(scale q k^T) v with k, v from the encoder's features. Vaswani et al. 2017, section 3.2.3.

    kv_heads: null is heads. d_memory: width of the features; null is d_model. scale: null is head_dim^-0.5 (T5's is 1).
    """

    kind: Literal["cross"] = "cross"
    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    d_memory: int | None = Field(default=None, ge=1)
    bias: bool = False
    scale: float | None = None

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def refusals(self) -> Mapping[str, str]:
        return halved(self.groups, f"{self.groups} heads are")

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def check(self, site: Site) -> None:
        if self.heads % self.groups:
            raise ValueError(f"`heads` ({self.heads}) is not a multiple of `kv_heads` ({self.groups})")
        whole_heads(self.heads, self.head_dim, site)

    def recalls(self, d_memory: int, site: Site) -> None:
        if (self.d_memory or site.d_in) != d_memory:
            raise ValueError(f"`d_memory` is {self.d_memory or site.d_in}, but the encoder's features have {d_memory}")

    def linears(self, site: Site) -> dict[str, Fan]:
        k, source = self.size(site), self.d_memory or site.d_in
        table = {"q": Fan(site.d_in, self.heads * k, self.bias, split=0)}
        table |= {name: Fan(source, self.groups * k, self.bias, split=0) for name in ("k", "v")}
        return table | {"out": Fan(self.heads * k, site.d_out, self.bias, out=True, split=1)}

    def state(self, site: Site) -> tuple[StateField, ...]:
        shape = (self.groups, self.size(site))
        return tuple(StateField(n, "memory", shape, split=0) for n in ("k", "v"))

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """Every query sees the whole memory. `k` and `v` map the memory's tokens, not the new ones."""
        attention = 4 * self.heads * self.size(site) * new * memory
        source = 2 * 2 * (self.d_memory or site.d_in) * self.groups * self.size(site)
        moved = source * ((memory if seen == 0 else 0) - new)
        return Cost(attention + moved, attention + moved)

    def build(self, site: Site) -> CrossMixer:
        return CrossMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4)
        yield cls(heads=4, kv_heads=2, head_dim=6, d_memory=20, bias=True)
        yield cls(heads=4, scale=0.7)


class CrossMixer(Mixer):
    """[N, D] -> [N, D]. The step that brings `step.memory` stores its keys and values; later steps read them."""

    def prepare_key(self) -> object:
        return "cross"

    def prepare(self, step: Step, state: State | None) -> Any:
        assert state is not None
        return ops.plan(step, state.layout(step), ALL)

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        size = self.spec.size(self.site)
        q = self.q(x, step).unflatten(-1, (-1, size))
        if step.memory is None:
            view = here.state.view(step)
        else:
            k, v = (m(step.memory.h, step).unflatten(-1, (-1, size)) for m in (self.k, self.v))
            view = here.state.append(step, k=here.tap("k", k), v=v)
        scores = ops.Scores(size**-0.5 if self.spec.scale is None else self.spec.scale)
        mix = ops.attend(here.tap("q", q), view, step, ALL, scores, step.table(self), here)
        return self.out(here.tap("mix", mix).flatten(1), step)


def reference(spec: Cross, weights: dict[str, Tensor], x: Tensor, positions: Tensor, memory: Tensor) -> Tensor:
    """[N, D] in float64 against a memory [M, D']: one token and one head at a time."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    scale = d**-0.5 if spec.scale is None else spec.scale
    zero = torch.zeros((), dtype=x.dtype)
    q, k, v = (
        source @ weights[f"{n}.weight"].T + weights.get(f"{n}.bias", zero)
        for n, source in (("q", x), ("k", memory), ("v", memory))
    )
    rows = []
    for i in range(x.shape[0]):
        heads = []
        for h in range(spec.heads):
            g = h // (spec.heads // spec.groups)
            z = torch.stack(
                [q[i, h * d : (h + 1) * d] @ k[j, g * d : (g + 1) * d] * scale for j in range(memory.shape[0])]
            )
            p = z.exp() / z.exp().sum()
            heads.append(torch.stack([p[j] * v[j, g * d : (g + 1) * d] for j in range(memory.shape[0])]).sum(0))
        rows.append(weights["out.weight"] @ torch.cat(heads) + weights.get("out.bias", zero))
    return torch.stack(rows)
