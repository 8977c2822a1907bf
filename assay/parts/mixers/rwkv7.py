"""RWKV-7's time mix: a state that decays by channel, removes what one key finds and adds at another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.precision import high
from assay.ops.scan.delta import CHUNK, executed, rank_one, run
from assay.ops.step import Step
from assay.parts._checks import halved, whole_heads
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, Spec, StateField, Weight

SLOWEST = 0.6065306597126334
"""exp(-1/2): no channel's logarithm of its decay falls below minus this."""


class Ranks(Spec):
    """Widths of the low-rank maps: of the decay, of the rate at which a key is replaced, of the share of the first
    layer's values, and of the gate. Peng et al. 2025, arXiv 2503.14456, appendix D, at d_model 768."""

    decay: int = Field(default=64, ge=1)
    rate: int = Field(default=64, ge=1)
    value: int = Field(default=32, ge=1)
    gate: int = Field(default=128, ge=1)


class Rwkv7(MixerSpec):
    """S_t = (Diag(w_t) - (a_t * u_t) u_t^T) S_(t-1) + k_t v_t^T and o_t = r_t S_t; u_t is the removed key.

    Peng et al. 2025, arXiv 2503.14456, section 4.1. Each of r, w, k, v, a, g is made of its own mixture of a token with
    the one before it. w = exp(-exp(-1/2) sigmoid(.)), a = sigmoid(.). A head's output is normed with `eps`, gets a
    bonus (r . rho k) v for its own token, and is gated. gives, takes: the first layer's values under a name, towards
    which a layer that takes them moves its own by a learned share. ranks: of the low-rank maps. chunk: tokens taken
    together by the training form; it changes speed and not results.
    """

    kind: Literal["rwkv7"] = "rwkv7"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    ranks: Ranks = Ranks()
    eps: float = Field(default=64e-5, gt=0.0)
    gives: str | None = None
    takes: str | None = None
    chunk: int = Field(default=CHUNK, ge=1)

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        if self.gives is not None and self.takes is not None:
            raise ValueError(f"`gives` ({self.gives}) and `takes` ({self.takes}): what is taken is not given again")

    def shares(self, giver: MixerSpec, site: Site) -> None:
        if not isinstance(giver, Rwkv7) or (giver.heads, giver.size(site)) != (self.heads, self.size(site)):
            raise ValueError(
                f"`takes` {self.takes!r} with {self.heads} heads of {self.size(site)}: its giver has others"
            )

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def linears(self, site: Site) -> dict[str, Fan]:
        width, ranks = self.heads * self.size(site), self.ranks
        table = {name: Fan(site.d_in, width, split=0) for name in ("r", "k", "v")}
        low = {"decay": ranks.decay, "rate": ranks.rate, "gate": ranks.gate}
        low |= {} if self.takes is None else {"share": ranks.value}
        for name, rank in low.items():
            table |= {f"{name}_down": Fan(site.d_in, rank), f"{name}_up": Fan(rank, width, split=0)}
        return table | {"out": Fan(width, site.d_out, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        """The mixtures start at sizes that grow over the channels and shrink with depth, decays from slow to fast."""
        size, depth = self.size(site), 1 - site.layer / site.layers
        shape, d = (self.heads, size), site.d_in
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        found = {
            f"mu_{name}": Weight((d,), "vector", Init.ramp(1.0, 0.0, power=power * depth))
            for name, power in powers.items()
        }
        width, slope = self.heads * size, 0.85 + (1 - depth) ** 0.5
        found |= {
            "decay_bias": Weight((width,), "vector", Init.ramp(-6.5, -1.5, power=slope), split=0),
            "rate_bias": Weight(shape, "vector", Init.constant(0.0), split=0),
            "removal": Weight(shape, "vector", Init.constant(0.85), split=0),
            "replace": Weight(shape, "vector", Init.constant(1.0), split=0),
            "bonus": Weight(shape, "vector", Init.constant(0.0), split=0),
            "norm_weight": Weight(shape, "vector", Init.constant(1.0), split=0),
            "norm_bias": Weight(shape, "vector", Init.constant(0.0), split=0),
        }
        return found | (
            {} if self.takes is None else {"share_bias": Weight(shape, "vector", Init.constant(1.0), split=0)}
        )

    def state(self, site: Site) -> tuple[StateField, ...]:
        size = self.size(site)
        return (
            StateField("s", "sequence", (self.heads, size, size), "float32", split=0),
            StateField("last", "sequence", (1, site.d_in)),
        )

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The recurrence: S is read with u and r, and gains two outer products, 2 FLOPs a multiply-add; the bonus.
        Executed: the products of a chunk (`ops.scan.delta.executed`)."""
        size = self.size(site)
        flops = self.heads * (8 * size * size + 4 * size) * new
        return Cost(flops, executed(new, self.heads, (size, size), self.chunk, by_head=False, writes=2))

    def build(self, site: Site) -> Rwkv7Mixer:
        return Rwkv7Mixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        small = Ranks(decay=3, rate=4, value=2, gate=5)
        yield cls(heads=2, ranks=small, chunk=8)
        yield cls(heads=3, head_dim=5, ranks=small, eps=1e-2, chunk=4)


class Rwkv7Mixer(Recurrent):
    """[N, D] -> [N, D]. Head counts are read from the tensors, so a shard of the heads runs the same lines."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes, size = step.table(self), self.spec.size(self.site)
        change = self.before(x, step, here) - x
        mixed = {name: x + getattr(self, f"mu_{name}") * change for name in ("r", "w", "k", "v", "a", "g")}

        def heads(y: Tensor) -> Tensor:
            return high(y.unflatten(-1, (-1, size)))

        r, k, v = (heads(m(mixed[n], step)) for n, m in (("r", self.r), ("k", self.k), ("v", self.v)))
        decay = heads(self.decay_up(torch.tanh(self.decay_down(mixed["w"], step)), step) + self.decay_bias)
        rate = torch.sigmoid(heads(self.rate_up(self.rate_down(mixed["a"], step), step)) + self.rate_bias)
        gate = heads(self.gate_up(torch.sigmoid(self.gate_down(mixed["g"], step)), step))
        v = self.shared(v, mixed["v"], heads, step, here)
        removed = F.normalize(k * self.removal, dim=-1)
        k = k * (1 + (rate - 1) * self.replace)
        laid = [lanes.lay(y) for y in (r, -removed, removed * rate, k, v, -SLOWEST * torch.sigmoid(decay))]
        updates = rank_one(laid[0], (laid[1], laid[2]), laid[3], laid[4], laid[5])
        past = lanes.stored(here.state.load("s", step))
        mix, end = run(updates, past, lanes.segment, here.state.keeps, self.spec.chunk)
        if end is not None:
            here.state.store(step, s=lanes.ends(end, step))
        mix = F.layer_norm(lanes.flat(mix), (size,), eps=self.spec.eps) * self.norm_weight + self.norm_bias
        mix = mix + (r * self.bonus * k).sum(-1, keepdim=True) * v
        return self.out(here.tap("mix", (mix * gate).to(x.dtype)).flatten(1), step)

    def before(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        """The token before each; 0 before the first of a document."""
        lanes = step.table(self)
        whole = torch.cat([lanes.start(here.state.load("last", step)).to(x.dtype), lanes.lay(x)], 1)
        if here.state.keeps:
            here.state.store(step, last=lanes.ends(lanes.tails(whole, 1), step))
        fresh, back = lanes.fresh(), whole[:, :-1]
        found: Tensor = lanes.flat(back if fresh is None else torch.where(fresh[..., None], 0.0, back))
        return found

    def shared(
        self,
        v: Float[Tensor, "N H K"],
        x: Float[Tensor, "N D"],
        heads: Callable[[Tensor], Tensor],
        step: Step,
        here: Here,
    ) -> Float[Tensor, "N H K"]:
        """The values, moved towards those of the layer that gives its own."""
        if self.spec.gives is not None:
            here.give(self.spec.gives, v)
        if self.spec.takes is None:
            return v
        share = torch.sigmoid(heads(self.share_up(self.share_down(x, step), step)) + self.share_bias)
        return torch.lerp(v, here.take(self.spec.takes), share)


def reference(
    spec: Rwkv7, weights: dict[str, Tensor], x: Tensor, positions: Tensor, first: Tensor | None = None
) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time; first: the values [N, H, K] that are taken."""
    size, before, out = spec.head_dim or x.shape[1] // spec.heads, torch.zeros_like(x[0]), []
    states = [torch.zeros(size, size, dtype=x.dtype) for _ in range(spec.heads)]

    def sigmoid(z: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-z))

    def low(name: str, z: Tensor) -> Tensor:
        z = weights[f"{name}_down.weight"] @ z
        z = torch.tanh(z) if name == "decay" else sigmoid(z) if name == "gate" else z
        return (weights[f"{name}_up.weight"] @ z).view(spec.heads, size)

    for t, row in enumerate(x):
        own = {n: row + weights[f"mu_{n}"] * (before - row) for n in ("r", "w", "k", "v", "a", "g")}
        r, k, v = ((weights[f"{n}.weight"] @ own[n]).view(spec.heads, size) for n in ("r", "k", "v"))
        w = torch.exp(
            -torch.exp(torch.tensor(-0.5, dtype=x.dtype))
            * sigmoid(low("decay", own["w"]) + weights["decay_bias"].view(spec.heads, size))
        )
        a, g = sigmoid(low("rate", own["a"]) + weights["rate_bias"]), low("gate", own["g"])
        if first is not None:
            v = v + (first[t] - v) * sigmoid(low("share", own["v"]) + weights["share_bias"])
        heads = []
        for h in range(spec.heads):
            u = k[h] * weights["removal"][h]
            u, added = u / (u @ u) ** 0.5, k[h] * (1 + (a[h] - 1) * weights["replace"][h])
            states[h] = (torch.diag(w[h]) - torch.outer(a[h] * u, u)) @ states[h] + torch.outer(added, v[h])
            o = r[h] @ states[h]
            o = (o - o.mean()) / (((o - o.mean()) ** 2).mean() + spec.eps) ** 0.5
            o = o * weights["norm_weight"][h] + weights["norm_bias"][h]
            heads.append((o + (r[h] * weights["bonus"][h]) @ added * v[h]) * g[h])
        out.append(weights["out.weight"] @ torch.cat(heads))
        before = row
    return torch.stack(out)
