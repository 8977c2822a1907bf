"""RWKV-4's time mixing: an average of values by a decay of its own for each channel, gated by the token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan.elementwise import LOWEST, shift, wkv
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Cost, Fan, Init, MixerSpec, Site, StateField, Weight


def begins(site: Site, share: float = 1.0, more: float = 0.0) -> Init:
    """(i / D)^p + more for channel i, where p falls from `share` to nearly 0 over the layers (their appendix E)."""
    power = share * (1 - site.layer / site.layers)
    return Init.ramp(more, more + (1 - 1 / site.d_in) ** power, power=power)


class Rwkv4(MixerSpec):
    """W_o (sigmoid(r) * wkv(k, v)), each of r, k, v a map of mu x_t + (1 - mu) x_(t-1). Peng et al. 2023, arXiv
    2305.13048, eqs. 11-17; the average in the form of their appendix D, whose states do not overflow.

    width: channels, null is d_model.
    """

    kind: Literal["rwkv4"] = "rwkv4"
    width: int | None = Field(default=None, ge=1)

    def refusals(self) -> Mapping[str, str]:
        odd = self.width is not None and self.width % 2
        return {"split": f"a width of {self.width} is not cut in two"} if odd else {}

    def channels(self, site: Site) -> int:
        return site.d_in if self.width is None else self.width

    def pieces(self, site: Site) -> Mapping[str, int]:
        return {"tensor": self.channels(site)}

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.channels(site)
        table = {name: Fan(site.d_in, width, split=0) for name in ("r", "k", "v")}
        return table | {"out": Fan(width, site.d_out, out=True, split=1)}

    def own(self, site: Site) -> dict[str, Weight]:
        """As they begin (appendix E, and its code): slower channels and more of the token before in later layers.

        decay: log w. first: u, what the token itself counts more.
        """
        width, place = self.channels(site), site.layer / max(1, site.layers - 1)
        mixed = {
            "mu_r": begins(site, 0.5),
            "mu_k": begins(site),
            "mu_v": begins(site, more=0.3 * place),
        }
        low, middle, high = (math.log(0.3) + more for more in (-0.5, 0.0, 0.5))
        return {name: Weight((site.d_in,), "vector", init) for name, init in mixed.items()} | {
            "decay": Weight((width,), "vector", Init.ramp(-5.0, 3.0, power=0.7 + 1.3 * place), split=0),
            "first": Weight((width,), "vector", Init.tiled(middle, high, low), split=0),
        }

    def state(self, site: Site) -> tuple[StateField, ...]:
        width = self.channels(site)
        return (
            StateField("shift", "sequence", (site.d_in,)),
            StateField("num", "sequence", (width,), "float32", split=0),
            StateField("den", "sequence", (width,), "float32", split=0),
            StateField("top", "sequence", (width,), "float32", LOWEST, split=0),
        )

    def cost(self, site: Site, new: int, seen: int, memory: int = 0) -> Cost:
        """Three mixes of two tokens; two sums, each with its decay and input, and the token itself in what is read."""
        return Cost((12 * site.d_in + 8 * self.channels(site)) * new)

    def build(self, site: Site) -> Rwkv4Mixer:
        return Rwkv4Mixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(width=11)


class Rwkv4Mixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes = step.table(self)
        before, last = shift(lanes.lay(x), lanes.start(here.state.load("shift", step)), lanes)
        before = lanes.flat(before)
        r, k, v = (
            linear(before + mu * (x - before), step)
            for linear, mu in ((self.r, self.mu_r), (self.k, self.mu_k), (self.v, self.mu_v))
        )
        high = torch.promote_types(x.dtype, torch.float32)
        past = [lanes.start(here.state.load(name, step)) for name in ("num", "den", "top")]
        decay, first = -torch.exp(self.decay.to(high)), self.first.to(high)
        y, ends = wkv(decay, first, lanes.lay(k.to(high)), lanes.lay(v.to(high)), past, lanes)
        if here.state.keeps:
            kept = zip(("shift", "num", "den", "top"), (last, *ends), strict=True)
            here.state.store(step, **{name: lanes.ends(end, step) for name, end in kept})
        return self.out(here.tap("mix", torch.sigmoid(r) * lanes.flat(y).to(x.dtype)), step)


def reference(spec: Rwkv4, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64, the sums as they are written: one sequence, each token from all before it."""
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    mixed = {n: weights[f"mu_{n}"] * x + (1 - weights[f"mu_{n}"]) * before for n in "rkv"}
    r, k, v = (mixed[n] @ weights[f"{n}.weight"].T for n in "rkv")
    w, u = torch.exp(weights["decay"]), weights["first"]
    rows = []
    for t in range(x.shape[0]):
        own = torch.exp(u + k[t])
        num, den = own * v[t], own
        for j in range(t):
            share = torch.exp(k[j] - (t - 1 - j) * w)
            num, den = num + share * v[j], den + share
        rows.append(weights["out.weight"] @ (num / den / (1 + torch.exp(-r[t]))))
    return torch.stack(rows)
