"""What crosses a group of processes inside a model, with its gradient; every byte is counted by the mesh's `Comm`.

The names say what happens to a tensor on the way forward; the way back is the transpose. A loss that every process of
the group computes from the same values is one loss and not a sum: `copied` and `summed` are a pair for that (f and g of
Shoeybi et al. 2019, arXiv 1909.08053, section 3), and so are `gathered` and `scattered` (g-bar and f-bar of Korthikanti
et al. 2022, arXiv 2205.05198, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from assay.train.parallel.comm import Comm
from assay.train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Line:
    """A group of n processes, this one being number `rank`, and what counts their bytes."""

    comm: Comm
    group: dist.ProcessGroup
    rank: int
    ranks: int

    @classmethod
    def of(cls, mesh: Mesh, axis: str) -> Line:
        group = mesh.group(axis)
        assert group is not None, f"{axis}: one process exchanges nothing"
        return cls(mesh.comm, group, mesh.rank(axis), mesh.size(axis))

    def summed_up(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, without a gradient."""
        y = x.detach().clone()
        self.comm.all_reduce(y, self.group)
        return y

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all processes' x, place by place, without a gradient."""
        y = x.detach().clone()
        self.comm.all_reduce(y, self.group, dist.ReduceOp.MAX)
        return y

    def gathered_up(self, x: Tensor) -> Tensor:
        """All processes' x one after another along the first dimension, without a gradient."""
        return self.comm.all_gather(x.detach().contiguous(), self.group).flatten(0, 1)

    def scattered_sum(self, x: Tensor) -> Tensor:
        """This process's part, along the first dimension, of the sum of all processes' x; without a gradient."""
        return self.comm.reduce_scatter(x.detach().contiguous().unflatten(0, (self.ranks, -1)), self.group)

    def kept(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def own(self, x: Tensor) -> Tensor:
        """This process's part, along the first dimension, of x, which all have."""
        return x.chunk(self.ranks)[self.rank].contiguous()


Way = Callable[[Line, Tensor], Tensor]


class Crossed(torch.autograd.Function):
    """y = there(line, x); dx = back(line, dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, there: Way, back: Way) -> Tensor:
        ctx.line, ctx.back = line, back
        return there(line, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(ctx.line, grads[0]), None, None, None


class Sent(torch.autograd.Function):
    """Rows to where they belong: give[i] of them to process i, take[i] from it; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, give: Sequence[int], take: Sequence[int]) -> Tensor:
        ctx.line, ctx.give, ctx.take = line, give, take
        return line.comm.all_to_all(x.detach(), give, take, line.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        line: Line = ctx.line
        return line.comm.all_to_all(grads[0], ctx.take, ctx.give, line.group), None, None, None


def copied(x: Tensor, line: Line) -> Tensor:
    """y = x; dx = sum of all dy."""
    return Crossed.apply(x, line, Line.kept, Line.summed_up)


def summed(x: Tensor, line: Line) -> Tensor:
    """y = sum of all x; dx = dy."""
    return Crossed.apply(x, line, Line.summed_up, Line.kept)


def gathered(x: Tensor, line: Line) -> Tensor:
    """y = all x one after another; dx = this process's part of the sum of all dy."""
    return Crossed.apply(x, line, Line.gathered_up, Line.scattered_sum)


def scattered(x: Tensor, line: Line) -> Tensor:
    """y = this process's part of the sum of all x; dx = all dy one after another."""
    return Crossed.apply(x, line, Line.scattered_sum, Line.gathered_up)


def sliced(x: Tensor, line: Line) -> Tensor:
    """y = this process's part of x, which all have; dx = all dy one after another."""
    return Crossed.apply(x, line, Line.own, Line.gathered_up)


def joined(x: Tensor, line: Line) -> Tensor:
    """y = all x one after another; dx = this process's part of dy, which all have."""
    return Crossed.apply(x, line, Line.gathered_up, Line.own)


def sent(x: Tensor, line: Line, give: Sequence[int], take: Sequence[int]) -> Tensor:
    return Sent.apply(x, line, give, take)
