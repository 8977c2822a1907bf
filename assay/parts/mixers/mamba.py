"""Mamba: a selective state-space model, a few numbers of state for each channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.conv import short_conv
from assay.ops.here import Here
from assay.ops.scan.elementwise import Selective, selective_scan
from assay.ops.step import Step
from assay.parts._checks import token_by_token
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, NormSpec, PartSpec, Site, StateField, Weight


class Mamba(MixerSpec):
    """h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t, y_t = C_t h_t + D x_t; dt, B and C are maps of x, which a convolution
    made of the token and those before it; y is gated by silu(z). Gu and Dao 2023, arXiv 2312.00752, section 3.

    width: channels, null is 2 d_model. state_dim: N. dt_rank: null is d_model / 16, rounded up. norm: on dt, B and C
    (Jamba, arXiv 2403.19887, section 6.4). discretise: how B becomes B_t dt_t: as in their code, or eq. 4.
    dt_range: the steps that channels begin with, in appendix E's draw.
    """

    kind: Literal["mamba"] = "mamba"
    width: int | None = Field(default=None, ge=1)
    state_dim: int = Field(default=16, ge=1)
    dt_rank: int | None = Field(default=None, ge=1)
    conv: int = Field(default=4, ge=2)
    conv_bias: bool = True
    bias: bool = False
    act: Activation = "silu"
    norm: NormSpec | None = None
    discretise: Literal["euler", "zoh"] = "euler"
    dt_range: tuple[float, float] = (1e-3, 1e-1)

    @field_validator("dt_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1]:
            raise ValueError("expected two steps, 0 < first < second")
        return value

    def check(self, site: Site) -> None:
        token_by_token("norm", self.norm)

    def channels(self, site: Site) -> int:
        return 2 * site.d_in if self.width is None else self.width

    def rank(self, site: Site) -> int:
        return -(-site.d_in // 16) if self.dt_rank is None else self.dt_rank

    def linears(self, site: Site) -> dict[str, Fan]:
        width, picked = self.channels(site), self.rank(site) + 2 * self.state_dim
        return {
            "x": Fan(site.d_in, width, self.bias),
            "z": Fan(site.d_in, width, self.bias),
            "select": Fan(width, picked),
            "out": Fan(width, site.d_out, self.bias, out=True),
        }

    def own(self, site: Site) -> dict[str, Weight]:
        width, rank = self.channels(site), self.rank(site)
        table = {
            "conv": Weight((width, self.conv), "vector", Init("uniform", self.conv**-0.5)),
            "dt_weight": Weight((width, rank), "matrix", Init("uniform", rank**-0.5)),
            "dt_bias": Weight((width,), "vector", Init.between(*self.dt_range, "softplus", log=True)),
            "a_log": Weight((width, self.state_dim), "vector", Init.ramp(1, self.state_dim, "log")),
            "d": Weight((width,), "vector", Init.constant(1.0)),
        }
        bound = Init("uniform", self.conv**-0.5)
        return table | ({"conv_bias": Weight((width,), "vector", bound)} if self.conv_bias else {})

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        sizes = {"dt": self.rank(site), "b": self.state_dim, "c": self.state_dim}
        if self.norm is None:
            return {}
        return {f"{name}_norm": (self.norm, site.child(f"{name}_norm", n, n)) for name, n in sizes.items()}

    def state(self, site: Site) -> tuple[StateField, ...]:
        width = self.channels(site)
        return (
            StateField("tail", "sequence", (self.conv - 1, width)),
            StateField("h", "sequence", (width, self.state_dim), "float32"),
        )

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The convolution, the state's decay and input and what is read of it, and the skip. Executed as a product of
        matrices is the reading alone."""
        width, size = self.channels(site), self.channels(site) * self.state_dim
        return Cost((2 * self.conv * width + 6 * size + 2 * width) * new, 2 * size * new)

    def build(self, site: Site) -> MambaMixer:
        return MambaMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(width=12, state_dim=3)
        yield cls(state_dim=4, dt_rank=3, conv=3, conv_bias=False, bias=True, discretise="zoh")
        yield cls.model_validate({"width": 10, "state_dim": 5, "norm": {"kind": "rmsnorm"}, "act": "gelu"})


class MambaMixer(Recurrent):
    """[N, D] -> [N, D]. dt is computed where tokens are, so that it is 0, and the state stays, at empty places."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, lanes = self.spec, step.table(self)
        tail = lanes.start(here.state.load("tail", step))
        bias = self.conv_bias if spec.conv_bias else None
        mixed, tail = short_conv(lanes.lay(self.x(x, step)), self.conv, bias, tail, lanes)
        u = activate(spec.act, lanes.flat(mixed))
        dt, b, c = self.select(u, step).split([self.dt_weight.shape[1], *[self.a_log.shape[1]] * 2], -1)
        if spec.norm is not None:
            dt, b, c = self.dt_norm(dt, step), self.b_norm(b, step), self.c_norm(c, step)
        high = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(F.linear(dt, self.dt_weight).to(high) + self.dt_bias)
        us, steps, into, out = (lanes.lay(t.to(high)) for t in (u, dt, b, c))
        past, rates = lanes.start(here.state.load("h", step)), -torch.exp(self.a_log.to(high))
        given = Selective(us, steps, rates, into, out)
        y, end = selective_scan(given, past, lanes, zoh=spec.discretise == "zoh")
        if here.state.keeps:
            here.state.store(step, tail=lanes.ends(tail, step), h=lanes.ends(end, step))
        y = lanes.flat(y).to(x.dtype) + self.d * u
        return self.out(here.tap("mix", y * F.silu(self.z(x, step))), step)


def reference(spec: Mamba, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one channel at a time."""

    def linear(name: str, row: Tensor) -> Tensor:
        y = weights[f"{name}.weight"] @ row
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def normed(name: str, row: Tensor) -> Tensor:
        if spec.norm is None:
            return row
        return row / ((row**2).mean() + 1e-6) ** 0.5 * weights[f"{name}_norm.weight"]

    n, rank = spec.state_dim, weights["dt_weight"].shape[1]
    width = weights["d"].shape[0]
    raw = [linear("x", row) for row in x]
    state = [torch.zeros(n, dtype=x.dtype) for _ in range(width)]
    rows = []
    for t, row in enumerate(x):
        total = weights.get("conv_bias", torch.zeros_like(raw[0]))
        for j in range(spec.conv):
            if t - j >= 0:
                total = total + weights["conv"][:, spec.conv - 1 - j] * raw[t - j]
        u = reference_activation(spec.act, total)
        picked = linear("select", u)
        dt, b, c = normed("dt", picked[:rank]), normed("b", picked[rank : rank + n]), normed("c", picked[rank + n :])
        steps = torch.log(1 + torch.exp(weights["dt_weight"] @ dt + weights["dt_bias"]))
        y = []
        for i in range(width):
            rate = -torch.exp(weights["a_log"][i])
            gain = steps[i] if spec.discretise == "euler" else (torch.exp(steps[i] * rate) - 1) / rate
            state[i] = torch.exp(steps[i] * rate) * state[i] + gain * b * u[i]
            y.append(c @ state[i] + weights["d"][i] * u[i])
        z = linear("z", row)
        rows.append(linear("out", torch.stack(y) * z / (1 + torch.exp(-z))))
    return torch.stack(rows)
