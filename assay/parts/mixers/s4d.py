"""S4D: a diagonal state-space model that is the same for every token, and so a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from assay.ops.activations import Activation, activate
from assay.ops.activations import reference as reference_activation
from assay.ops.here import Here
from assay.ops.scan.invariant import CHUNK, System, invariant
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, StateField, Weight


class S4d(MixerSpec):
    """W act(y) with y_t = Re(C h_t) + D x_t, h_t = exp(dt A) h_(t-1) + (exp(dt A) - 1) / A x_t, for each channel.

    Gu et al. 2022, arXiv 2206.11893, eqs. 2-5: zero-order hold; B is in C. It begins as their S4D-Lin (complex: A_n =
    -1/2 + i pi n) or S4D-Real (A_n = -(n + 1)).

    modes: numbers of state a channel; a complex one stands for itself and its conjugate, so it counts twice in y.
    gate: W is twice as wide, and one half gates the other (their GLU). chunk: changes speed and not results.
    """

    kind: Literal["s4d"] = "s4d"
    modes: int = Field(default=32, ge=1)
    numbers: Literal["complex", "real"] = "complex"
    act: Activation = "gelu"
    gate: bool = True
    dt_range: tuple[float, float] = (1e-3, 1e-1)
    chunk: int = Field(default=CHUNK, ge=2)

    @field_validator("dt_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1]:
            raise ValueError("expected two steps, 0 < first < second")
        return value

    @property
    def pair(self) -> tuple[int, ...]:
        """The last dimensions of a state: a complex number is stored as two."""
        return (self.modes, 2) if self.numbers == "complex" else (self.modes,)

    def refusals(self) -> Mapping[str, str]:
        return {"split": "its gate stands behind the sum over all channels"} if self.gate else {}

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {} if self.gate else {"tensor": site.d_in}

    def linears(self, site: Site) -> dict[str, Fan]:
        return {"out": Fan(site.d_in, site.d_out * (2 if self.gate else 1), bias=True, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        d, paired = site.d_in, self.numbers == "complex"
        rates = Init.constant(math.log(0.5)) if paired else Init.ramp(1, self.modes, "log")
        table = {
            "log_dt": Weight((d,), "vector", Init.between(*self.dt_range, "log", log=True), split=0),
            "log_rate": Weight((d, self.modes), "vector", rates, split=0),
            "c": Weight((d, *self.pair), "vector", Init("normal", 0.5**0.5 if paired else 1.0), split=0),
            "d": Weight((d,), "vector", Init("normal", 1.0), split=0),
        }
        turns = Init.ramp(0.0, math.pi * (self.modes - 1))
        return table | ({"turn": Weight((d, self.modes), "vector", turns, split=0)} if paired else {})

    def state(self, site: Site) -> tuple[StateField, ...]:
        return (StateField("h", "sequence", (site.d_in, *self.pair), "float32", split=0),)

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """Decay and input of each mode, what is read of it, and the skip: a complex product is four, one with a real
        number two. Executed: a chunk's tokens into its last state, and the state before into its tokens."""
        paired = self.numbers == "complex"
        each, reals = (8 + 4 + 4, 2 * self.modes) if paired else (2 + 2 + 2, self.modes)
        chunks = -(-new // self.chunk)
        executed = 0 if new == 1 else 4 * site.d_in * reals * chunks * self.chunk
        return Cost((each * self.modes + 2) * site.d_in * new, executed)

    def build(self, site: Site) -> S4dMixer:
        return S4dMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls(modes=3, chunk=4)
        yield cls(modes=4, chunk=5, numbers="real", gate=False, act="silu")


class S4dMixer(Recurrent):
    """[N, D] -> [N, D]. A shard reads its own channels of x."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        spec, lanes, paired = self.spec, step.table(self), self.spec.numbers == "complex"
        rank, ranks = self.piece
        x = x.chunk(ranks, -1)[rank]
        high = torch.promote_types(x.dtype, torch.float32)
        past = lanes.start(here.state.load("h", step)).to(high)
        past = torch.view_as_complex(past) if paired else past
        keeps = here.state.keeps
        y, end = invariant(lanes.lay(x.to(high)), self.system(high), past, lanes, chunk=spec.chunk, keeps=keeps)
        if keeps:
            assert end is not None
            end = torch.view_as_real(end) if paired else end
            here.state.store(step, h=lanes.ends(end, step))
        y = activate(spec.act, here.tap("mix", lanes.flat(y).to(x.dtype) + self.d * x))
        y = self.out(y, step)
        return F.glu(y, -1) if spec.gate else y

    def system(self, dtype: torch.dtype) -> System:
        """dt A, the discrete B, and C."""
        a, c = -torch.exp(self.log_rate.to(dtype)), self.c.to(dtype)
        if self.spec.numbers == "complex":
            a, c = torch.complex(a, self.turn.to(dtype)), 2 * torch.view_as_complex(c)
        power = torch.exp(self.log_dt.to(dtype))[:, None] * a
        return System(power, torch.expm1(power) / a, c)


def reference(spec: S4d, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64: one sequence, one token, one channel and one mode at a time, complex numbers by hand."""
    paired, d = spec.numbers == "complex", x.shape[1]
    y = [[weights["d"][i] * x[t, i] for i in range(d)] for t in range(x.shape[0])]
    for i in range(d):
        dt = torch.exp(weights["log_dt"][i])
        for n in range(spec.modes):
            re = -torch.exp(weights["log_rate"][i, n])
            im = weights["turn"][i, n] if paired else torch.zeros_like(re)
            grow = (torch.exp(dt * re) * torch.cos(dt * im), torch.exp(dt * re) * torch.sin(dt * im))
            size = re**2 + im**2
            enter = (((grow[0] - 1) * re + grow[1] * im) / size, (grow[1] * re - (grow[0] - 1) * im) / size)
            c = 2 * weights["c"][i, n] if paired else (weights["c"][i, n], torch.zeros_like(re))
            h = (torch.zeros_like(re), torch.zeros_like(re))
            for t in range(x.shape[0]):
                h = (
                    grow[0] * h[0] - grow[1] * h[1] + enter[0] * x[t, i],
                    grow[0] * h[1] + grow[1] * h[0] + enter[1] * x[t, i],
                )
                y[t][i] = y[t][i] + c[0] * h[0] - c[1] * h[1]
    rows = []
    for row in y:
        out = weights["out.weight"] @ reference_activation(spec.act, torch.stack(row)) + weights["out.bias"]
        half = out.shape[0] // 2
        rows.append(out[:half] / (1 + torch.exp(-out[half:])) if spec.gate else out)
    return torch.stack(rows)
