"""Linear attention: a state of fixed size for each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts._checks import halved, whole_heads
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, MixerSpec, Site, StateField

Feature = Literal["elu1", "relu", "identity", "taylor"]


class LinearAttention(MixerSpec):
    """Causal attention with kernel features: o_i = phi(q_i) S_i / (phi(q_i) z_i), S_i = sum_{j<=i} phi(k_j) v_j^T.

    Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 16-20, with phi(x) = elu(x) + 1. `normalise: false` leaves out z.
    features: the size of a head's queries and keys; null is head_dim.
    feature: phi. `taylor` of x in R^f is (1, x / f^(1/4), x x^T / sqrt(2 f)), so that
    phi(q) phi(k) = 1 + s + s^2 / 2, s = q k / sqrt(f): exp(s) to the second order (Based, arXiv 2402.18668, sec. 4.1).
    chunk: tokens that are computed at once; it changes speed and not results.
    """

    kind: Literal["linear"] = "linear"
    heads: int = Field(ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    normalise: bool = True
    feature: Feature = "elu1"
    features: int | None = Field(default=None, ge=1)
    chunk: int = Field(default=ops.CHUNK, ge=1)

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def size(self, site: Site) -> int:
        return self.head_dim if self.head_dim is not None else site.d_in // self.heads

    def key_size(self, site: Site) -> int:
        return self.size(site) if self.features is None else self.features

    def expanded(self, site: Site) -> int:
        """How many numbers phi gives."""
        f = self.key_size(site)
        return 1 + f + f * f if self.feature == "taylor" else f

    def check(self, site: Site) -> None:
        whole_heads(self.heads, self.head_dim, site)
        if self.normalise and self.feature == "identity":
            raise ValueError(
                "`feature` 'identity' has weights below 0, whose sum is no norm; accepted: normalise: false"
            )

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def linears(self, site: Site) -> dict[str, Fan]:
        keys, values = self.heads * self.key_size(site), self.heads * self.size(site)
        table = {"q": Fan(site.d_in, keys, split=0), "k": Fan(site.d_in, keys, split=0)}
        return table | {"v": Fan(site.d_in, values, split=0), "out": Fan(values, site.d_out, out=True, split=1)}

    def state(self, site: Site) -> tuple[StateField, ...]:
        k = self.expanded(site)
        fields = [StateField("s", "sequence", (self.heads, k, self.size(site)), "float32", split=0)]
        if self.normalise:
            fields.append(StateField("z", "sequence", (self.heads, k), "float32", split=0))
        return tuple(fields)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The recurrence, and q.z for each token where it normalises; executed with z as a column of the state."""
        k, v = self.expanded(site), self.size(site)
        norm = 2 * self.heads * k * new if self.normalise else 0
        flops = ops.cost(new, self.heads, (k, v), self.heads, self.chunk).flops + norm
        columns = v + 1 if self.normalise else v
        return Cost(flops, ops.cost(new, self.heads, (k, columns), self.heads, self.chunk).executed)

    def build(self, site: Site) -> LinearMixer:
        return LinearMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=2, chunk=6)
        yield cls(heads=3, head_dim=5, normalise=False, feature="relu", chunk=4)
        yield cls(heads=2, features=3, feature="taylor", chunk=7)
        yield cls(heads=2, head_dim=6, features=4, feature="identity", normalise=False, chunk=5)


class LinearMixer(Recurrent):
    """[N, D] -> [N, D]. The normaliser is one more value column of ones, so state and output are one recurrence."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, lanes = self.spec, step.table(self)
        size, keys = spec.size(self.site), spec.key_size(self.site)
        q, k = (here.tap(n, m(x, step).unflatten(-1, (-1, keys))) for n, m in (("q", self.q), ("k", self.k)))
        v = self.v(x, step).unflatten(-1, (-1, size))
        past = lanes.start(here.state.load("s", step))
        if spec.normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
            past = torch.cat([past, lanes.start(here.state.load("z", step))[..., None]], -1)
        q, k, v = (lanes.lay(t) for t in (phi(spec.feature, q), phi(spec.feature, k), v))
        mix, end = ops.decayed(q, k, v, None, past, lanes, spec.chunk)
        if end is not None:
            kept = {"s": end[..., :size]} | ({"z": end[..., size]} if spec.normalise else {})
            here.state.store(step, **{name: lanes.ends(value, step) for name, value in kept.items()})
        mix = lanes.flat(mix)
        if spec.normalise:
            total = mix[..., size:]
            # No key near enough to be counted: the sum that it would divide is 0 as well.
            mix = mix[..., :size] / torch.where(total < torch.finfo(total.dtype).tiny, 1.0, total)
        return self.out(here.tap("mix", mix).flatten(1), step)


def phi(feature: Feature, x: Float[Tensor, "N H F"]) -> Float[Tensor, "N H K"]:
    """The features of queries or keys."""
    if feature == "elu1":
        return F.elu(x) + 1
    if feature == "relu":
        return F.relu(x)
    if feature == "identity":
        return x
    size = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x * size**-0.25, square * (2 * size) ** -0.5], -1)


def reference(spec: LinearAttention, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: every pair of tokens by itself, without a state."""
    d = spec.head_dim if spec.head_dim is not None else x.shape[1] // spec.heads
    f = d if spec.features is None else spec.features

    def likeness(q: Tensor, k: Tensor) -> Tensor:
        if spec.feature == "taylor":
            s = (q @ k) / f**0.5
            return 1 + s + s * s / 2
        if spec.feature == "elu1":
            q, k = (torch.where(t > 0, t + 1, torch.exp(t)) for t in (q, k))
        if spec.feature == "relu":
            q, k = (torch.where(t > 0, t, torch.zeros_like(t)) for t in (q, k))
        return q @ k

    q, k, v = (x @ weights[f"{n}.weight"].T for n in ("q", "k", "v"))
    rows = []
    for i in range(x.shape[0]):
        heads = []
        for h in range(spec.heads):
            part, own = slice(h * f, (h + 1) * f), slice(h * d, (h + 1) * d)
            shares = [likeness(q[i, part], k[j, part]) for j in range(i + 1)]
            mixed = torch.stack([share * v[j, own] for j, share in enumerate(shares)]).sum(0)
            heads.append(mixed / sum(shares) if spec.normalise else mixed)
        rows.append(weights["out.weight"] @ torch.cat(heads))
    return torch.stack(rows)
