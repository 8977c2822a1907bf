"""What mixers with heads that forget share: an outer product for each head, a norm and a gate behind it."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from assay.ops.here import Here
from assay.ops.scan import decayed as ops
from assay.ops.step import Step
from assay.parts.mixers._recurrent import Recurrent
from assay.spec.base import Fan, MixerSpec, NormSpec, PartSpec, Site, StateField


class Retention(MixerSpec):
    """out(silu(x W_g) * norm_h(o)): heads whose keys and values differ in size, each head's output through `norm`.

    gate: whether the factor of silu stands there. chunk: tokens that are computed at once; it changes speed and not
    results.
    """

    kind: str
    heads: int = Field(ge=1)
    norm: NormSpec
    gate: bool = True
    chunk: int = Field(default=ops.CHUNK, ge=1)

    def key_size(self, site: Site) -> int:
        """Channels of a head's queries and keys."""
        raise NotImplementedError

    def value_size(self, site: Site) -> int:
        """Channels of a head's values."""
        raise NotImplementedError

    def linears(self, site: Site) -> dict[str, Fan]:
        keys, values = self.heads * self.key_size(site), self.heads * self.value_size(site)
        widths = {"q": keys, "k": keys, "v": values} | ({"gate_map": values} if self.gate else {})
        table = {name: Fan(site.d_in, width, split=0) for name, width in widths.items()}
        return table | {"out": Fan(values, site.d_out, out=True, split=1)}

    def children(self, site: Site) -> dict[str, tuple[PartSpec, Site]]:
        v = self.value_size(site)
        return {"norm": (self.norm, site.child("norm", v, v))}

    def state(self, site: Site) -> tuple[StateField, ...]:
        shape = (self.heads, self.key_size(site), self.value_size(site))
        return (StateField("s", "sequence", shape, "float32", split=0),)


class DecayedMixer(Recurrent):
    """[N, D] -> [N, D]."""

    def recall(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, step: Step, here: Here) -> Float[Tensor, "N H V"]:
        """What queries [N, H, K] find behind keys [N, H, K] and values [N, H, V], and behind what is stored; the log
        decay is laid out in lanes (`ops.scan.decayed`)."""
        lanes = step.table(self)
        past = lanes.stored(here.state.load("s", step))
        q, k, v = (lanes.lay(t) for t in (here.tap("q", q), here.tap("k", k), v))
        mix, end = ops.decayed(q, k, v, decay, past, lanes, self.spec.chunk)
        if end is not None:
            here.state.store(step, s=lanes.ends(end, step))
        return here.tap("mix", lanes.flat(mix))

    def closed(self, mix: Float[Tensor, "N H V"], x: Float[Tensor, "N D"], step: Step) -> Float[Tensor, "N D"]:
        """Normed by head, gated, and mapped onto the stream."""
        y = self.norm(mix).flatten(1)
        out: Tensor = self.out(F.silu(self.gate_map(x, step)) * y if self.spec.gate else y, step)
        return out
