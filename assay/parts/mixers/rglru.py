"""The real-gated linear recurrent unit in Griffin's block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.activations import Activation, glu
from assay.ops.activations import reference as reference_activation
from assay.ops.conv import short_conv
from assay.ops.here import Here
from assay.ops.scan.elementwise import scan
from assay.ops.step import Step
from assay.parts._checks import halved
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, StateField, Weight

STEEPEST = 1000.0


class RgLru(MixerSpec):
    """W_o (act(W_y x) * h), h_t = a_t h_(t-1) + sqrt(1 - a_t^2) i_t u_t with a_t = exp(-power r_t softplus(rate)).

    u is W_x x after a convolution, r and i are sigmoid gates of u with block-diagonal maps. The first token of a
    sequence enters whole, with 1 for the root (their released code). De et al. 2024, arXiv 2402.19427, section 2.4.

    heads: blocks of the gates' maps. width: channels, null is d_model. power: their c.
    """

    kind: Literal["rglru"] = "rglru"
    heads: int = Field(ge=1)
    width: int | None = Field(default=None, ge=1)
    conv: int = Field(default=4, ge=2)
    act: Activation = "gelu_tanh"
    power: float = Field(default=8.0, gt=0.0)
    bias: bool = True

    def refusals(self) -> Mapping[str, str]:
        return halved(self.heads, f"{self.heads} heads are")

    def channels(self, site: Site) -> int:
        return site.d_in if self.width is None else self.width

    def check(self, site: Site) -> None:
        if self.channels(site) % self.heads:
            raise ValueError(f"`width` ({self.channels(site)}) is not a multiple of `heads` ({self.heads})")

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.heads}

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.channels(site)
        table = {name: Fan(site.d_in, width, self.bias, split=0) for name in ("x", "y")}
        return table | {"out": Fan(width, site.d_out, self.bias, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        """The gates multiply from the right: [heads, in, out]. rate: exp(-softplus(rate)), the decay without gate and
        power, is even in (0.9, 0.999): the bounds of their released code, which is even in its square."""
        width, zero = self.channels(site), Init.constant(0.0)
        size = width // self.heads
        gates = {
            name: Weight((self.heads, size, size), "matrix", Init.fan_in(size), split=0) for name in ("input", "recur")
        }
        biases = {f"{name}_bias": Weight((self.heads, size), "vector", zero, split=0) for name in ("input", "recur")}
        return {
            "conv": Weight((width, self.conv), "vector", Init("uniform", self.conv**-0.5), split=0),
            "conv_bias": Weight((width,), "vector", zero, split=0),
            "rate": Weight((width,), "vector", Init.between(1e-3, 1e-1, "sigmoid"), split=0),
            **gates,
            **biases,
        }

    def state(self, site: Site) -> tuple[StateField, ...]:
        width = self.channels(site)
        return (
            StateField("tail", "sequence", (self.conv - 1, width), split=1),
            StateField("h", "sequence", (width,), "float32", split=0),
        )

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """The convolution, and the state's decay and input."""
        return Cost((2 * self.conv + 4) * self.channels(site) * new)

    def build(self, site: Site) -> RgLruMixer:
        return RgLruMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(heads=4)
        yield cls(heads=3, width=15, conv=2, act="silu", power=2.0, bias=False)


class _Root(torch.autograd.Function):
    """sqrt(x) with a derivative of at most `STEEPEST`: a decay that rounds to 1 would else give infinity (theirs)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (4 * x).clamp(min=STEEPEST**-2).rsqrt()


class RgLruMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        tail = lanes.start(here.state.load("tail", step))
        mixed, tail = short_conv(lanes.lay(self.x(x, step)), self.conv, self.conv_bias, tail, lanes)
        u = lanes.flat(mixed)
        high = torch.promote_types(x.dtype, torch.float32)
        enters, recurs = (self.gated(u, n).to(high) for n in ("input", "recur"))
        log_a = -self.spec.power * recurs * F.softplus(self.rate.to(high))
        share = torch.where((step.index == 0)[:, None], 1.0, _Root.apply(-torch.expm1(2 * log_a)))
        past = lanes.start(here.state.load("h", step))
        h, end = scan(lanes.lay(log_a.exp()), lanes.lay(share * enters * u), past, lanes)
        if here.state.keeps:
            here.state.store(step, tail=lanes.ends(tail, step), h=lanes.ends(end, step))
        return self.out(here.tap("mix", glu(self.spec.act, self.y(x, step), lanes.flat(h).to(x.dtype))), step)

    def gated(self, u: Float[Tensor, "N C"], name: str) -> Float[Tensor, "N C"]:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        heads = u.unflatten(1, (weight.shape[0], -1)).transpose(0, 1)
        return torch.sigmoid(torch.bmm(heads, weight).transpose(0, 1) + bias).flatten(1)


def reference(spec: RgLru, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token and one head at a time."""

    def linear(name: str, row: Tensor) -> Tensor:
        y = weights[f"{name}.weight"] @ row
        return y + weights[f"{name}.bias"] if spec.bias else y

    def gate(name: str, row: Tensor) -> Tensor:
        size = row.shape[0] // spec.heads
        parts = [
            row[i * size : (i + 1) * size] @ weights[name][i] + weights[f"{name}_bias"][i] for i in range(spec.heads)
        ]
        return 1 / (1 + torch.exp(-torch.cat(parts)))

    raw = [linear("x", row) for row in x]
    h, rows = torch.zeros_like(raw[0]), []
    for t, row in enumerate(x):
        u = weights["conv_bias"]
        for j in range(spec.conv):
            if t - j >= 0:
                u = u + weights["conv"][:, spec.conv - 1 - j] * raw[t - j]
        a = torch.exp(-spec.power * gate("recur", u) * torch.log(1 + torch.exp(weights["rate"])))
        share = (1 - a**2) ** 0.5 if t else 1.0
        h = a * h + share * gate("input", u) * u
        rows.append(linear("out", h * reference_activation(spec.act, linear("y", row))))
    return torch.stack(rows)
