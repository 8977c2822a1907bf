"""Ring attention: keys and values go from rank to rank, and no rank holds more than two ranks' of them.

Liu et al. 2023, arXiv 2310.01889: in round i, rank r has the keys and values of rank r - i, and what its queries make
of them is joined to what they made of those before by their log-sum-exp. Backward they go round again, with their
gradients, and each round's probabilities are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.attend.apart import Apart
from assay.ops.attend.api import attend_lse, plan
from assay.ops.attend.merge import Part, merge
from assay.ops.attend.plan import Plan
from assay.ops.attend.rule import Scores
from assay.ops.sees import Sees
from assay.ops.step import Layout, Step, View
from assay.train.parallel.exchange import Line

Parted = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Part]
"""(rank whose keys they are, q, k, v, sink) -> attention over these keys alone."""


class Joined(Mapping[str, Tensor]):
    """Fields of all ranks, exchanged when the first of them is read."""

    def __init__(self, names: tuple[str, ...], exchange: Callable[[], Mapping[str, Tensor]]) -> None:
        self._names, self._exchange = names, exchange
        self._found: Mapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._found is None:
            self._found = self._exchange()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class Around:
    """Where each rank's entries stand, and who sees which of them: found once a step for layers with the same rule."""

    layouts: tuple[Layout, ...]
    plans: dict[tuple[Sees, int], Plan] = field(default_factory=dict)

    @classmethod
    def of(cls, whole: Layout, places: Tensor) -> Around:
        """places: [ranks, T / ranks], the columns of each."""
        own = [here.to(whole.seq.device) for here in places]
        return cls(tuple(Layout(whole.seq[:, h], whole.index[:, h], whole.positions[:, h], True) for h in own))

    def plan(self, step: Step, sees: Sees, source: int) -> Plan:
        if (sees, source) not in self.plans:
            backend = step.attention if step.attention in ("oracle", "tiled") else "matmul"
            self.plans[sees, source] = plan(step, self.layouts[source], sees, backend)
        return self.plans[sees, source]


@dataclass(frozen=True, eq=False)
class Ring(Apart):
    """own: this rank's entries [N, ...]."""

    own: Mapping[str, Tensor]
    line: Line
    around: Around

    def attended(
        self, q: Float[Tensor, "N H K"], step: Step, sees: Sees, scores: Scores, made: Plan | None
    ) -> Float[Tensor, "N H V"] | None:
        """None for biases, whose weights would be reached from two sides, and for blocks that queries choose."""
        chosen = made is not None and (made.allowed is not None or (made.mask is not None and made.mask.dim() > 3))
        if scores.bias is not None or scores.dropout or chosen or not {"k", "v"} <= self.own.keys():
            return None
        parted = partial(self._part, step, sees, scores)
        found: Tensor = Round.apply(q, self.own["k"], self.own["v"], scores.sink, parted, self.line)
        return found

    def _part(self, step: Step, sees: Sees, scores: Scores, source: int, *read: Tensor | None) -> Part:
        """read: q, k, v and the sink, which stands beside this rank's own keys."""
        q, k, v, sink = cast("tuple[Tensor, Tensor, Tensor, Tensor | None]", read)
        layout = self.around.layouts[source]
        fields = {name: x.view(*layout.seq.shape, *x.shape[1:]) for name, x in (("k", k), ("v", v))}
        rule = replace(scores, sink=sink if source == self.line.rank else None)
        return attend_lse(q, View(fields, layout), step, sees, rule, self.around.plan(step, sees, source))


class Round(torch.autograd.Function):
    """Attention of q over the keys and values of all ranks; saves this rank's alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, parted: Parted, line: Line) -> Tensor:
        block, total = _flat(k, v), parted(line.rank, q, k, v, sink)
        for source in _sources(line):
            block = _passed(block, line)
            total = merge(total, parted(source, q, *_parts(block, k, v), sink))
        ctx.parted, ctx.line = parted, line
        ctx.save_for_backward(q, k, v, sink, *total)
        return total[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With o = sum w_i o_i and w_i = exp(l_i - l): do_i = w_i do and dl_i = w_i do . (o_i - o)."""
        q, k, v, sink, out, lse = ctx.saved_tensors
        line, dout = ctx.line, grads[0]
        block, dq, dsink = _flat(k, v), torch.zeros_like(q), None
        dblock = torch.zeros_like(block)
        for source in (line.rank, *_sources(line)):
            if source != line.rank:
                block, dblock = _passed(block, line), _passed(dblock, line)
            leaves = [x.detach().requires_grad_() for x in (q, *_parts(block, k, v))]
            leaves += [] if sink is None or source != line.rank else [sink.detach().requires_grad_()]
            with torch.enable_grad():
                part, own = ctx.parted(source, *leaves[:3], leaves[3] if len(leaves) > 3 else None)
            weight = torch.where(own.isfinite(), torch.exp(own - lse), 0.0).detach()[..., None]
            back = (weight * dout, (weight * dout * (part - out).detach()).sum(-1))
            found = torch.autograd.grad((part, own), leaves, back)
            dq += found[0]
            dblock += _flat(found[1], found[2])
            dsink = found[3] if len(leaves) > 3 else dsink
        return dq, *_parts(_passed(dblock, line), k, v), dsink, None, None


def _sources(line: Line) -> Iterator[int]:
    """Whose keys are here in each round but the first."""
    return ((line.rank - i) % line.ranks for i in range(1, line.ranks))


def _passed(block: Tensor, line: Line) -> Tensor:
    """What the rank before had; the next one gets this rank's."""
    into = torch.empty_like(block)
    gone = line.comm.send(block, (line.rank + 1) % line.ranks, line.group, wait=False)
    line.comm.receive(into, (line.rank - 1) % line.ranks, line.group)
    if gone is not None:
        gone.wait()
    return into


def _flat(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([k.flatten(1), v.flatten(1)], 1).contiguous()


def _parts(block: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, in the shapes of these."""
    left, right = block.split([k[0].numel(), v[0].numel()], 1)
    return left.reshape(k.shape), right.reshape(v.shape)
