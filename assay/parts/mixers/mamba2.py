"""Mamba-2: a state space whose transition is one number a head, chosen by the token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from assay.ops.conv import short_convs
from assay.ops.here import Here
from assay.ops.native.scans import Act
from assay.ops.norm import rms_norm
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts._checks import halved
from assay.parts.linears.dense import together
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, Spec, StateField, Weight


class TimeStep(Spec):
    """low, high: between which a head's step lies at first, drawn evenly in its logarithm. at_least, at_most: what
    bounds it afterwards; null does not."""

    low: float = Field(default=0.001, gt=0.0)
    high: float = Field(default=0.1, gt=0.0)
    at_least: float = Field(default=0.0, ge=0.0)
    at_most: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"`low` ({self.low}) is not below `high` ({self.high})")
        if self.at_most is not None and self.at_least >= self.at_most:
            raise ValueError(f"`at_least` ({self.at_least}) is not below `at_most` ({self.at_most})")
        return self


class GatedNorm(Spec):
    """RMSNorm over each group's share of the heads, `after` the gate, norm(y silu(z)), or `before`, norm(y) silu(z)."""

    eps: float = 1e-5
    place: Literal["after", "before"] = "after"


class Mamba2(MixerSpec):
    """y_t = C_t S_t + D x_t, S_t = exp(dt_t A) S_(t-1) + B_t (dt_t x_t)^T, A = -exp(A_log); out(norm(y silu(z))).

    Dao and Gu 2024, arXiv 2405.21060, sections 6 and 7: x, B, C and z are linear in the input, x, B and C go through a
    short convolution and SiLU, dt = softplus(linear + dt_bias). B is the key, C the query and dt x the value.
    heads: null is 2 d_model / head_dim. groups: heads of B and C. conv: its taps. bias: of the linear maps.
    chunk: tokens that are computed at once; it changes speed and not results.
    """

    kind: Literal["mamba2"] = "mamba2"
    heads: int | None = Field(default=None, ge=1)
    head_dim: int = Field(default=64, ge=1)
    state_size: int = Field(default=128, ge=1)
    groups: int = Field(default=1, ge=1)
    conv: int = Field(default=4, ge=2)
    conv_bias: bool = True
    bias: bool = False
    dt: TimeStep = TimeStep()
    norm: GatedNorm = GatedNorm()
    chunk: int = Field(default=ops.CHUNK, ge=1)

    def count(self, site: Site) -> int:
        return self.heads if self.heads is not None else 2 * site.d_in // self.head_dim

    def inner(self, site: Site) -> int:
        """The width of x, z and y."""
        return self.count(site) * self.head_dim

    def mixed(self, site: Site) -> int:
        """The channels of the convolution: x, B and C."""
        return self.inner(site) + 2 * self.groups * self.state_size

    def check(self, site: Site) -> None:
        if self.heads is None and 2 * site.d_in % self.head_dim:
            wide = 2 * site.d_in
            raise ValueError(f"2 d_model ({wide}) is not a multiple of `head_dim` ({self.head_dim}); give `heads`")
        if self.count(site) % self.groups:
            raise ValueError(f"{self.count(site)} heads are not a multiple of `groups` ({self.groups})")

    def refusals(self) -> Mapping[str, str]:
        return halved(self.groups, f"groups of heads that share B, C and a norm: {self.groups} are")

    def pieces(self, site: Site) -> Mapping[str, int]:
        """Groups, each with its heads, its B and C, and its norm."""
        return {"tensor": self.groups} if self.groups > 1 else {}

    def sections(self, site: Site) -> tuple[int, int, int]:
        """The channels of x, B and C, side by side in the convolution."""
        return self.inner(site), self.groups * self.state_size, self.groups * self.state_size

    def linears(self, site: Site) -> dict[str, Fan]:
        widths = {"z": self.inner(site), "x": self.inner(site)}
        widths |= dict.fromkeys(("b", "c"), self.groups * self.state_size) | {"dt": self.count(site)}
        table = {name: Fan(site.d_in, width, self.bias, split=0) for name, width in widths.items()}
        return table | {"out": Fan(self.inner(site), site.d_out, self.bias, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        h, c = (self.count(site),), self.mixed(site)
        table = {
            "conv": Weight((c, self.conv), "vector", Init("uniform", self.conv**-0.5)),
            "A_log": Weight(h, "vector", Init.between(1.0, 16.0, link="log")),
            "D": Weight(h, "vector", Init.constant(1.0)),
            "dt_bias": Weight(h, "vector", Init.between(self.dt.low, self.dt.high, link="softplus", log=True)),
            "norm": Weight((self.inner(site),), "vector", Init.constant(1.0)),
        }
        table |= {"conv_bias": Weight((c,), "vector", Init.constant(0.0))} if self.conv_bias else {}
        sections = {name: self.sections(site) for name in table if name.startswith("conv")}
        return {name: replace(w, split=0, sections=sections.get(name, ())) for name, w in table.items()}

    def state(self, site: Site) -> tuple[StateField, ...]:
        shape = (self.count(site), self.state_size, self.head_dim)
        tail = StateField("tail", "sequence", (self.conv - 1, self.mixed(site)), split=1)
        return StateField("s", "sequence", shape, "float32", split=0), tail

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The recurrence and the convolution, whose taps are elementwise products."""
        sizes = (self.state_size, self.head_dim)
        taps = Cost(2 * self.conv * self.mixed(site) * new)
        return ops.cost(new, self.count(site), sizes, self.groups, self.chunk) + taps

    def build(self, site: Site) -> Mamba2Mixer:
        return Mamba2Mixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(head_dim=16, state_size=6, chunk=5)
        yield cls(heads=4, head_dim=3, state_size=4, groups=2, conv=3, bias=True, chunk=8, norm=GatedNorm(eps=1e-2))
        limits = TimeStep(at_least=0.3, at_most=0.9)
        yield cls(
            heads=2, head_dim=5, state_size=3, conv_bias=False, dt=limits, norm=GatedNorm(place="before"), chunk=4
        )


class Mamba2Mixer(Recurrent):
    """[N, D] -> [N, D]. Widths are read from the tensors, so a shard of the groups runs the same lines."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, lanes = self.spec, step.table(self)
        *parts, dt, z = together(x, step, self.x, self.b, self.c, self.dt, self.z)
        values, keys, queries, tail = self.convolved(parts, step, here)
        made = ops.steps(dt, self.dt_bias, self.A_log, spec.dt.at_least, spec.dt.at_most)
        dt, decay = (lanes.lay(t) for t in made)  # 0 where a place holds nothing: nothing decays, nothing is written
        past = lanes.stored(here.state.load("s", step))
        y, end = ops.state_space(ops.StateSpace(queries, keys, values, dt, decay, self.D), past, lanes, spec.chunk)
        y = here.tap("mix", lanes.flat(y).flatten(1))
        if end is not None:
            here.state.store(step, s=lanes.ends(end, step), tail=lanes.ends(tail, step))
        return self.out(self.normed(y, z.to(y.dtype)).to(x.dtype), step)

    def convolved(self, parts: list[Tensor], step: Step, here: Here) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values [L, T, H, P], keys and queries [L, T, G, N] in lanes, and the convolution's inputs at their ends."""
        spec, lanes = self.spec, step.table(self)
        sizes, past = [p.shape[-1] for p in parts], lanes.stored(here.state.load("tail", step))
        biases = self.conv_bias.split(sizes) if spec.conv_bias else (None,) * 3
        laid = [lanes.lay(p) for p in parts]
        made, tail = short_convs(laid, self.conv.split(sizes), biases, past, lanes, Act(silu=True, wide=True))
        values, keys, queries = made
        keys, queries = (t.unflatten(-1, (-1, spec.state_size)) for t in (keys, queries))
        return values.unflatten(-1, (-1, spec.head_dim)), keys, queries, tail

    def normed(self, y: Float[Tensor, "N I"], z: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
        rule, gate = self.spec.norm, F.silu(z)
        y = y * gate if rule.place == "after" else y
        gain, groups = self.norm.to(y.dtype), self.spec.groups // self.piece[1]
        if groups == 1:
            y = rms_norm(y, gain, rule.eps)
        else:
            y = rms_norm(y.unflatten(-1, (groups, -1)), None, rule.eps).flatten(1) * gain
        return y if rule.place == "after" else y * gate


def reference(spec: Mamba2, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""
    heads = spec.heads if spec.heads is not None else 2 * x.shape[1] // spec.head_dim
    p, n, inner, zero = spec.head_dim, spec.state_size, heads * spec.head_dim, torch.zeros((), dtype=x.dtype)

    def linear(name: str, row: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ row + weights.get(f"{name}.bias", zero)

    def silu(t: Tensor) -> Tensor:
        return t / (1 + torch.exp(-t))

    state = [torch.zeros(n, p, dtype=x.dtype) for _ in range(heads)]
    inputs = [torch.cat([linear(name, row) for name in ("x", "b", "c")]) for row in x]
    rows = []
    for t, row in enumerate(x):
        early = range(max(0, t - spec.conv + 1), t + 1)
        taps = [weights["conv"][:, spec.conv - 1 - t + i] * inputs[i] for i in early]
        mixed = silu(torch.stack(taps).sum(0) + weights.get("conv_bias", zero))
        dt = torch.log(1 + torch.exp(linear("dt", row) + weights["dt_bias"]))
        dt = torch.clamp(dt, spec.dt.at_least, spec.dt.at_most)
        outs = []
        for h in range(heads):
            g = h // (heads // spec.groups)
            v = mixed[h * p : (h + 1) * p]
            b = mixed[inner + g * n : inner + (g + 1) * n]
            c = mixed[inner + (spec.groups + g) * n : inner + (spec.groups + g + 1) * n]
            a = torch.exp(-dt[h] * torch.exp(weights["A_log"][h]))
            state[h] = a * state[h] + torch.outer(b, dt[h] * v)
            outs.append(c @ state[h] + weights["D"][h] * v)
        y, gate = torch.cat(outs), silu(linear("z", row))
        y = y * gate if spec.norm.place == "after" else y
        y = torch.cat([u / ((u * u).mean() + spec.norm.eps) ** 0.5 for u in y.chunk(spec.groups)]) * weights["norm"]
        rows.append(linear("out", y if spec.norm.place == "after" else y * gate))
    return torch.stack(rows)
