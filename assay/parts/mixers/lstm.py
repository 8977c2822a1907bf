"""The long short-term memory: what everything else here is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.lanes import Lanes
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Fan, Init, MixerSpec, Site, StateField, Weight


class Lstm(MixerSpec):
    """c_t = f_t c_(t-1) + i_t tanh(g_t), h_t = o_t tanh(c_t); i, f, g, o maps of x_t and of h_(t-1); out(h_t).

    Hochreiter and Schmidhuber 1997 (doi 10.1162/neco.1997.9.8.1735), with the forget gate of Gers et al. 2000 (doi
    10.1162/089976600300015015). Gates read what the layer said of the token before, so that nothing makes the tokens of
    a sequence parallel: the layer is a loop over them, in training too. That is what it is here to show.

    width: of h and c; null is d_model. forget: added to the forget gate's logit, which starts the memory open
    (Jozefowicz et al. 2015, section 4).
    """

    kind: Literal["lstm"] = "lstm"
    width: int | None = Field(default=None, ge=1)
    forget: float = 1.0
    bias: bool = True

    def size(self, site: Site) -> int:
        return site.d_in if self.width is None else self.width

    def linears(self, site: Site) -> dict[str, Fan]:
        width = self.size(site)
        return {"into": Fan(site.d_in, 4 * width, self.bias), "out": Fan(width, site.d_out, out=True)}

    def own(self, site: Site) -> dict[str, Weight]:
        width = self.size(site)
        return {"recur": Weight((4 * width, width), "matrix", Init("uniform", width**-0.5))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        return tuple(StateField(name, "sequence", (self.size(site),), "float32") for name in ("h", "c"))

    def build(self, site: Site) -> LstmMixer:
        return LstmMixer(self, site)

    @classmethod
    def tiny(cls) -> Iterator[Self]:
        yield cls()
        yield cls(width=7, forget=0.0, bias=False)


class LstmMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def forward(self, x: Float[Tensor, "N D"], step: Step, here: Here) -> Float[Tensor, "N D"]:
        lanes: Lanes = step.table(self)
        high = torch.promote_types(x.dtype, torch.float32)
        h, c = (lanes.start(here.state.load(name, step)).to(high) for name in ("h", "c"))
        y, h, c = self.run(lanes.lay(self.into(x, step)).to(high), h, c, lanes)
        if here.state.keeps:
            here.state.store(step, h=lanes.ends(h, step), c=lanes.ends(c, step))
        return self.out(here.tap("mix", lanes.flat(y).to(x.dtype)), step)

    def run(
        self, z: Float[Tensor, "L T F"], h: Float[Tensor, "L W"], c: Float[Tensor, "L W"], lanes: Lanes
    ) -> tuple[Float[Tensor, "L T W"], Float[Tensor, "L W"], Float[Tensor, "L W"]]:
        """What the input says of the four gates, and the state before it, to every h and the state after each lane."""
        recur, fresh, filled, said = self.recur.T.to(z.dtype), lanes.fresh(), lanes.filled, []
        for t in range(lanes.length):
            if fresh is not None:
                h, c = (v.masked_fill(fresh[:, t, None], 0.0) for v in (h, c))
            i, f, g, o = torch.addmm(z[:, t], h, recur).chunk(4, -1)
            after = torch.sigmoid(f + self.spec.forget) * c + torch.sigmoid(i) * torch.tanh(g)
            told = torch.sigmoid(o) * torch.tanh(after)
            if filled is not None:
                real = (t < filled)[:, None]
                told, after = torch.where(real, told, h), torch.where(real, after, c)
            h, c = told, after
            said.append(h)
        return torch.stack(said, 1), h, c


def reference(spec: Lstm, weights: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """[N, D] in float64 for one sequence, one token and one unit at a time."""
    width = weights["recur"].shape[1]
    h, c = [x.new_zeros(()) for _ in range(width)], [x.new_zeros(()) for _ in range(width)]

    def sigmoid(z: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-z))

    def tanh(z: Tensor) -> Tensor:
        return 1 - 2 / (1 + torch.exp(2 * z))

    rows = []
    for row in x:
        before = torch.stack(h)
        for u in range(width):
            i, f, g, o = (
                weights["into.weight"][n * width + u] @ row
                + (weights["into.bias"][n * width + u] if spec.bias else 0.0)
                + weights["recur"][n * width + u] @ before
                for n in range(4)
            )
            c[u] = sigmoid(f + spec.forget) * c[u] + sigmoid(i) * tanh(g)
            h[u] = sigmoid(o) * tanh(c[u])
        rows.append(weights["out.weight"] @ torch.stack(h))
    return torch.stack(rows)
