"""What crosses a group of processes inside a model, with its gradient; every byte is counted by the mesh's `Comm`.

The names say what happens to a tensor on the way forward; the way back is the transpose. A loss that every process of
the group computes from the same values is one loss and not a sum: `copied` and `summed` are a pair for that (f and g of
Shoeybi et al. 2019, arXiv 1909.08053, section 3), and so are `gathered` and `scattered` (g-bar and f-bar of Korthikanti
et al. 2022, arXiv 2205.05198, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Copied(torch.autograd.Function):
    """y = x; dx = sum of all dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.line.summed_up(grads[0]), None


class Summed(torch.autograd.Function):
    """y = sum of all x; dx = dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        return line.summed_up(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Gathered(torch.autograd.Function):
    """y = all x one after another; dx = this process's part of the sum of all dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return line.gathered_up(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.line.scattered_sum(grads[0]), None


class Scattered(torch.autograd.Function):
    """y = this process's part of the sum of all x; dx = all dy one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return line.scattered_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.line.gathered_up(grads[0]), None


class Sliced(torch.autograd.Function):
    """y = this process's part of x, which all have; dx = all dy one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return x.chunk(line.ranks)[line.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.line.gathered_up(grads[0]), None


class Joined(torch.autograd.Function):
    """y = all x one after another; dx = this process's part of dy, which all have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return line.gathered_up(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.line.ranks)[ctx.line.rank].contiguous(), None


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
    return Copied.apply(x, line)


def summed(x: Tensor, line: Line) -> Tensor:
    return Summed.apply(x, line)


def gathered(x: Tensor, line: Line) -> Tensor:
    return Gathered.apply(x, line)


def scattered(x: Tensor, line: Line) -> Tensor:
    return Scattered.apply(x, line)


def sliced(x: Tensor, line: Line) -> Tensor:
    return Sliced.apply(x, line)


def joined(x: Tensor, line: Line) -> Tensor:
    return Joined.apply(x, line)


def sent(x: Tensor, line: Line, give: Sequence[int], take: Sequence[int]) -> Tensor:
    return Sent.apply(x, line, give, take)
