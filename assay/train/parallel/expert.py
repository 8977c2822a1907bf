"""Expert parallelism: each rank has some of the experts, and tokens travel to those they chose and back.

Lepikhin et al. 2020, arXiv 2006.16668, section 3.2, without a capacity: every row is sent, so that no token is dropped
and a run computes what one process does. Ranks read different rows of the batch; what all of them have is trained by
the sum of their gradients, and experts by what was sent to them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.model.lm import LM
from assay.parts.base import Part
from assay.parts.cut import cut
from assay.parts.ffns.moe import Experts
from assay.spec.shard import cut_weights, owned
from assay.train.parallel.exchange import Line, sent
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.plan import deal_of


class Dispatch:
    """Two exchanges of rows forward (there and back) and two backward; the counts go before in a small one."""

    def __init__(self, line: Line) -> None:
        self.line = line

    def __call__(self, experts: Experts, rows: Float[Tensor, "M C"], counts: Int[Tensor, "E"]) -> Float[Tensor, "M C"]:
        """Rank r of n has experts r E / n to (r + 1) E / n, so that rows sorted by expert are sorted by rank."""
        line = self.line
        own = counts.shape[0] // line.ranks
        everyone = line.comm.all_gather(counts, line.group)
        theirs = everyone[:, line.rank * own : (line.rank + 1) * own]  # of each rank's rows, those of each expert here
        give, take = counts.view(line.ranks, own).sum(1).tolist(), theirs.sum(1).tolist()
        arrived = sent(rows, line, give, take)
        expert = torch.arange(own, device=rows.device).repeat(line.ranks).repeat_interleave(theirs.flatten())
        order = torch.argsort(expert, stable=True)
        out = experts(arrived.index_select(0, order), expert.index_select(0, order), theirs.sum(0))
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        return sent(out.index_select(0, back), line, take, give)


def apply(model: LM, mesh: Mesh) -> None:
    """Leave this rank its experts, in place. ValueError where the ranks do not divide them, or where there are none."""
    deal_of(model.spec, mesh)
    line, found = Line.of(mesh, "expert"), {m.name: m for m in model.modules() if isinstance(m, Part)}
    for site, spec in owned(model.spec):
        if cuts := cut_weights(spec, site, "expert", line.ranks):
            part: Any = found[site.name]
            cut(part, cuts, line.rank, line.ranks)
            part.across = Dispatch(line)
