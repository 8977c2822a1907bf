"""Collectives that count what they send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Comm:
    """Collectives over a group of n processes; None is a process alone, which sends nothing.

    sent: bytes that this process sends to others by kind, as the ring algorithms do: of a tensor of M bytes,
    2 (n-1)/n M for all_reduce, (n-1)/n M for reduce_scatter and all_gather, M its whole (Patarasuk and Yuan 2009,
    doi 10.1016/j.jpdc.2008.09.002); what leaves this process for all_to_all and send. calls: how often.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def count(self, kind: str, size: float) -> None:
        self.sent[kind] += round(size)
        self.calls[kind] += 1

    def reset(self) -> None:
        self.sent.clear()
        self.calls.clear()

    def all_reduce(self, x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> dist.Work | None:
        """Sum (or op) in place; without waiting, the work to wait for."""
        if group is None:
            return None
        n = group.size()
        self.count("all_reduce", 2 * (n - 1) / n * x.nbytes)
        return dist.all_reduce(x, op, group, async_op=not wait)

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        """[n, ...]: everybody's x, which has one shape everywhere, in the order of ranks."""
        n = group.size() if group is not None else 1
        out = x.new_empty(n, *x.shape)
        if group is None:
            return out.copy_(x[None])
        self.gather_into(out, x.contiguous(), group)
        return out

    def gather_into(self, out: Tensor, x: Tensor, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
        n = group.size()
        self.count("all_gather", (n - 1) / n * out.nbytes)
        return GATHER(out.view(-1), x.view(-1), group, async_op=not wait)

    def reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        """x is [n, ...]: the sum of everybody's x[rank]."""
        if group is None:
            return x[0]
        out = x.new_empty(x.shape[1:])
        self.scatter_into(out, x.contiguous(), group)
        return out

    def scatter_into(self, out: Tensor, x: Tensor, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
        n = group.size()
        self.count("reduce_scatter", (n - 1) / n * x.nbytes)
        return SCATTER(out.view(-1), x.view(-1), dist.ReduceOp.SUM, group, async_op=not wait)

    def all_to_all(self, x: Tensor, give: Sequence[int], take: Sequence[int], group: Group) -> Tensor:
        """Rows of x, give[i] of them for process i; returns take[i] rows from each process i, one after another."""
        if group is None:
            return x.clone()
        out = x.new_empty(sum(take), *x.shape[1:])
        own = give[group.rank()]
        self.count("all_to_all", (sum(give) - own) * (x[:1].nbytes if len(x) else 0))
        dist.all_to_all_single(out, x.contiguous(), list(take), list(give), group=group)
        return out

    def send(self, x: Tensor, to: int, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
        """To place `to` of the group."""
        self.count("send", x.nbytes)
        if wait:
            dist.send(x.contiguous(), group=group, group_dst=to)
            return None
        return dist.isend(x.contiguous(), group=group, group_dst=to)

    def receive(self, into: Tensor, source: int, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
        """From place `source` of the group."""
        if wait:
            dist.recv(into, group=group, group_src=source)
            return None
        return dist.irecv(into, group=group, group_src=source)

    def total(self, x: Tensor, group: Group) -> Tensor:
        """The sum over the group, the same on all; gradients are summed as well: a loss made of it is one loss, of
        which every process adds its share."""
        return x if group is None else Total.apply(x, self, group)


class Total(torch.autograd.Function):
    """y = sum over processes of x; dx = sum over processes of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, group: dist.ProcessGroup) -> Tensor:
        ctx.comm, ctx.group = comm, group
        y = x.detach().clone()
        comm.all_reduce(y, group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        dx = grads[0].clone()
        ctx.comm.all_reduce(dx, ctx.group)
        return dx, None, None
