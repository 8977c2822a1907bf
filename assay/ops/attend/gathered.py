"""Attention that multiplies what is seen: groups of queries with the keys gathered for them, merged where a query is in
several; forward and backward in one pass over the parts, with the probabilities made again.

The merge is the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867), the backward pass that of
FlashAttention (Dao et al. 2022, arXiv 2205.14135, algorithm 4).

Legend: R rows of the grid, T queries, S keys, H query heads, G key heads, P = H / G; g groups of t queries and s keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.attend import tiled
from assay.ops.attend.call import Call
from assay.ops.attend.parts import Part

LOG2_E = math.log2(math.e)


def refuses(call: Call) -> str | None:
    """Why this call cannot be served, or None."""
    if call.plan.parts is None:
        return "the plan has no parts: nothing was left out"
    if call.scores.dropout > 0.0:
        return "`gathered` makes its probabilities again in the backward pass, where dropout would be another"
    if call.scores.bias is not None and call.plan.by_head:
        return "`gathered` has no bias where each head has parts of its own"
    return None if tiled.refuses(call) is None else "`gathered` has no gradient for a bias with parameters of its own"


def run(call: Call) -> tuple[Tensor, Tensor]:
    """[R, T, H, V] and the log-sum-exp [R, T, H]."""
    assert call.plan.parts is not None
    (rows, tokens, heads, size), groups = call.q.shape, call.k.shape[2]
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    q = call.q.unflatten(2, (groups, -1)).permute(0, 2, 1, 3, 4)
    k, v = (x.transpose(1, 2) for x in (call.k, call.v))
    if call.plan.by_head:  # each head, or each group of heads, has parts of its own: all count in one long row
        shared = call.plan.by_head != heads
        q = (q if shared else q.transpose(2, 3)).reshape(1, 1, -1, heads // groups if shared else 1, size)
        k, v = (x.reshape(1, 1, -1, x.shape[-1]) for x in (k, v))
    q, k, v = (x.to(dtype).contiguous() for x in (q * call.scores.scale, k, v))
    out, lse = Gathered.apply(q, k, v, call.plan.parts, Rule(call))
    if call.plan.by_head and call.plan.by_head == heads:
        out, lse = out.view(rows, heads, tokens, -1).transpose(1, 2), lse.view(rows, heads, tokens).transpose(1, 2)
    else:
        out = out.view(rows, groups, tokens, heads // groups, -1).transpose(1, 2).flatten(2, 3)
        lse = lse.view(rows, groups, tokens, -1).transpose(1, 2).flatten(2)
    out = out.to(call.v.dtype)
    if call.scores.sink is None:
        return out, lse
    # The sink's logit takes 1 - sigmoid(lse - sink) of every softmax and gives no value.
    sink = call.scores.sink.to(lse.dtype)
    return out * torch.sigmoid(lse - sink)[..., None].to(out.dtype), torch.logaddexp(lse, sink)


@dataclass(frozen=True)
class Rule:
    """How q.k of a part becomes logits."""

    call: Call

    def capped(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Soft-capped scaled products, and the slope of the soft cap if there is one."""
        cap = self.call.scores.softcap
        if cap is None:
            return z, None
        curve = torch.tanh(z / cap)
        return cap * curve, 1 - curve**2

    def biased(self, z: Tensor, q: Tensor, part: Part) -> Tensor:
        """z [R, G, g, t, P, s] and the bias, for scaled queries [R, G, g, t, P, K]."""
        bias = self.call.scores.bias
        if bias is None:
            return z
        q_pos, k_pos = (x[:, 0] for x in self.call.positions(slice(None), slice(None)))
        q_pos, k_pos = q_pos[:, part.q.clamp(max=q_pos.shape[1] - 1)], k_pos[:, part.k]
        z, q = (x.permute(0, 2, 1, 4, 3, 5) for x in (z, q / self.call.scores.scale))
        z = bias.tile(z.flatten(2, 3), q.flatten(2, 3), q_pos[:, :, None], k_pos[:, :, None])
        return z.unflatten(2, q.shape[2:4]).permute(0, 2, 1, 4, 3, 5)


@dataclass(frozen=True)
class Tile:
    """A part's queries [B, t * P, K], keys and values [B, s, .], B = R * G * g, and its logits [R, G, g, t, P, s]."""

    part: Part
    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, part: Part, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tile:
        asking = taken(q, part.q.clamp(max=q.shape[2] - 1))
        q = asking.flatten(3, 4).flatten(0, 2)
        k, v = (taken(x, part.k).flatten(0, 2) for x in (k, v))
        z, slope = rule.capped(torch.bmm(q, k.transpose(1, 2)).view(*asking.shape[:-1], -1))
        z = rule.biased(z, asking, part)
        if part.mask is not None:
            z.masked_fill_(~part.mask[:, None, :, :, None], float("-inf"))
        return cls(part, q, k, v, z, slope)

    def flat(self, x: Tensor) -> Tensor:
        """[R, G, g, t, P, E] -> [B, t * P, E]."""
        return x.flatten(3, 4).flatten(0, 2)


def exp_(x: Tensor) -> Tensor:
    """e^x, in place. On a CPU torch's `exp` takes 30 times as long for -inf, of which masks are full, and `exp2` does
    not."""
    return x.mul_(LOG2_E).exp2_()


def taken(x: Tensor, columns: Tensor) -> Tensor:
    """[R, G, N, ...] at columns [g, t]: [R, G, g, t, ...]."""
    return x.index_select(2, columns.flatten()).unflatten(2, columns.shape)


def put(into: Tensor, columns: Tensor, x: Tensor) -> None:
    """[R, G, g, t, ...] into [R, G, N, ...]; padding has a place of its own, the last."""
    into.index_copy_(2, columns.flatten(), x.flatten(2, 3))


class Gathered(torch.autograd.Function):
    """q [R, G, T, P, K], k and v [R, G, S, .] to the output and its log-sum-exp [R, G, T, P]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: tuple[Part, ...], rule: Rule
    ) -> tuple[Tensor, Tensor]:
        rows, groups, tokens, shared, _ = q.shape
        lowest = torch.finfo(q.dtype).min
        top = q.new_full((rows, groups, tokens + 1, shared, 1), float("-inf"))
        total, out = torch.zeros_like(top), q.new_zeros(*top.shape[:-1], v.shape[-1])
        for part in parts:
            tile = Tile.of(part, q, k, v, rule)
            before = taken(top, part.q)
            new = torch.maximum(before, tile.z.amax(-1, keepdim=True))
            base = new.clamp(min=lowest)  # so far nothing is visible: exp(-inf - lowest) is 0, exp(-inf + inf) is not
            p, fade = exp_(tile.z.sub_(base)), exp_(before - base)
            mixed = torch.bmm(tile.flat(p), tile.v).view(*p.shape[:-1], -1)
            put(total, part.q, torch.addcmul(p.sum(-1, keepdim=True), taken(total, part.q), fade))
            put(out, part.q, mixed.addcmul_(taken(out, part.q), fade))
            put(top, part.q, new)
        top, total, out = (x[:, :, :tokens] for x in (top, total, out))
        safe = total.where(total > 0, 1.0)
        out, lse = out.div_(safe), (top + torch.log(safe))[..., 0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.rule = parts, rule
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tokens = q.shape[2]
        inner = (out * d_out).sum(-1, keepdim=True) - d_lse[..., None]
        lse = lse.where(lse.isfinite(), 0.0)[..., None]
        dq = q.new_zeros(*q.shape[:2], tokens + 1, *q.shape[3:])
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for part in ctx.parts:
            tile, read = Tile.of(part, q, k, v, ctx.rule), part.q.clamp(max=tokens - 1)
            p = exp_(tile.z.sub_(taken(lse, read)))
            d = tile.flat(taken(d_out, read))
            dp = torch.bmm(d, tile.v.transpose(1, 2)).view_as(p)
            ds = dp.sub_(taken(inner, read)).mul_(p)
            ds = tile.flat(ds if tile.slope is None else ds.mul_(tile.slope))
            sums = (dq, part.q, torch.bmm(ds, tile.k)), (dk, part.k, torch.bmm(ds.transpose(1, 2), tile.q))
            for into, columns, more in (*sums, (dv, part.k, torch.bmm(tile.flat(p).transpose(1, 2), d))):
                into.index_add_(2, columns.flatten(), more.view(*into.shape[:2], columns.numel(), *into.shape[3:]))
        return dq[:, :, :tokens], dk, dv, None, None
