"""What mixers by the delta rule share: keys and queries of length one, short convolutions before, a norm behind."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.conv import short_convs
from assay.ops.here import Here
from assay.ops.native.scans import Act
from assay.ops.norm import unit
from assay.ops.precision import high
from assay.ops.scan.delta import CHUNK, Updates, executed, run
from assay.ops.step import Step
from assay.parts._checks import token_by_token, whole_heads
from assay.parts.linears.dense import together
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, NormSpec, PartSpec, Site, StateField, Weight

UNIT_EPS = 1e-6
"""Under the root of the length that queries and keys are divided by, as in flash-linear-attention."""


class DeltaSpec(MixerSpec):
    """Queries, keys and values through a convolution of `conv` taps (null: none) and SiLU; queries and keys divided by
    their lengths, queries by sqrt(head_dim) too; each head's output through `norm`.

    head_dim: of queries and keys, null is d_model / heads. value_dim: null is head_dim. negative: beta in (0, 2), so
    that I - beta k k^T may turn a direction round (Grazzi et al. 2024, arXiv 2411.12537). chunk: tokens taken together
    by the training form; it changes speed and not results.
    """

    kind: str
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)
    conv: int | None = Field(default=4, ge=2)
    negative: bool = False
    norm: NormSpec = Field(default="rmsnorm", validate_default=True)
    chunk: int = Field(default=CHUNK, ge=1)

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys."""
        return self.heads

    @property
    def rounds(self) -> int:
        """Updates of the state a token."""
        return 1

    def sizes(self, site: Site) -> tuple[int, int]:
        """Channels of a key and of a value."""
        key = self.head_dim if self.head_dim is not None else site.d_in // self.heads
        return key, key if self.value_dim is None else self.value_dim

    def refusals(self) -> Mapping[str, str]:
        if self.heads % 2 or self.key_heads % 2:
            return {"split": f"{self.heads} heads with {self.key_heads} of keys are not cut in two"}
        return {}

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        token_by_token("norm", self.norm)
        for child, place in self.children(site).values():
            child.check(place)

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": math.gcd(self.heads, self.key_heads)}

    def linears(self, site: Site) -> dict[str, Fan]:
        key, value = self.sizes(site)
        widths = {"q": self.key_heads * key, "k": self.key_heads * key * self.rounds}
        widths |= {"v": self.heads * value * self.rounds, "beta": self.heads * self.rounds}
        table = {name: Fan(site.d_in, width, split=0) for name, width in widths.items()}
        return table | {"out": Fan(self.heads * value, site.d_out, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        if self.conv is None:
            return {}
        init, taps = Init("uniform", self.conv**-0.5), self.conv
        widths = {name: DeltaSpec.linears(self, site)[name].d_out for name in ("q", "k", "v")}
        return {f"{name}_conv": Weight((width, taps), "vector", init, split=0) for name, width in widths.items()}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        value = self.sizes(site)[1]
        return {"norm": (self.norm, site.child("norm", value, value))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        kept = StateField("s", "sequence", (self.heads, *self.sizes(site)), "float32", split=0)
        if self.conv is None:
            return (kept,)
        width = sum(w.shape[0] for name, w in self.own(site).items() if name.endswith("_conv"))
        return kept, StateField("tail", "sequence", (self.conv - 1, width), split=1)

    def counted(self, site: Site, new: int, by_head: bool) -> Cost:
        """The recurrence: a round reads S with k and adds k p^T, and q reads S, 2 FLOPs a multiply-add; and the taps.
        Executed: the products of a chunk (`ops.scan.delta.executed`); its triangular solve is not counted by torch."""
        key, value = self.sizes(site)
        width = sum(w.numel for name, w in self.own(site).items() if name.endswith("_conv"))
        flops = self.heads * key * value * (4 * self.rounds + 2) + 2 * width
        return Cost(flops * new, executed(self.rounds * new, self.heads, (key, value), self.chunk, by_head))


class DeltaMixer(Recurrent):
    """[N, D] -> [N, D]. Head counts are read from the tensors, so a shard of the heads runs the same lines."""

    def made(self, x: Float[Tensor, "N D"], step: Step, *names: str) -> list[Tensor]:
        """What these maps make of x, all at once."""
        return together(x, step, *(getattr(self, name) for name in names))

    def qkv(self, parts: list[Tensor], step: Step, here: Here) -> tuple[Tensor, Tensor, Tensor]:
        """Of what q, k and v made: unit queries and keys [L, T, G, K] and values [L, T, H, V], where a token with
        several rounds has as many heads of keys and values, those of one head side by side."""
        lanes, (key, value) = step.table(self), self.spec.sizes(self.site)
        parts = [lanes.lay(p) for p in parts]
        if self.spec.conv is None:
            parts = [high(F.silu(p)) for p in parts]
        else:
            past, weights = lanes.stored(here.state.load("tail", step)), (self.q_conv, self.k_conv, self.v_conv)
            parts, tail = short_convs(parts, weights, (None,) * 3, past, lanes, Act(silu=True, wide=True))
            if here.state.keeps:
                here.state.store(step, tail=lanes.ends(tail, step))
        q, k, v = (z.unflatten(-1, (-1, size)) for z, size in zip(parts, (key, key, value), strict=True))
        return unit(q, UNIT_EPS, key**-0.5), unit(k, UNIT_EPS), v

    def rate(self, beta: Float[Tensor, "N H"], step: Step) -> Float[Tensor, "L T H"]:
        """How far what a key finds moves towards the value; 0 at places without a token."""
        beta = torch.sigmoid(high(beta))
        laid: Tensor = step.table(self).lay(2 * beta if self.spec.negative else beta)
        return laid

    def recall(self, updates: Updates, step: Step, here: Here) -> Float[Tensor, "N H V"]:
        """Each head's normed output; the state goes on from what is stored."""
        lanes, rounds = step.table(self), self.spec.rounds
        segment = lanes.segment if lanes.segment is None else lanes.segment.repeat_interleave(rounds, 1)
        past = lanes.stored(here.state.load("s", step))
        mix, end = run(updates, past, segment, here.state.keeps, self.spec.chunk)
        if end is not None:
            here.state.store(step, s=lanes.ends(end, step))
        normed: Tensor = self.norm(lanes.flat(mix[:, rounds - 1 :: rounds]))
        return normed
