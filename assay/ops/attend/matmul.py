"""Attention by matrix products, forward and backward: the fast path on a CPU, and the plain one that does everything.

The blocked path multiplies each block of queries with the keys that somebody in it sees, in pieces that stay in cache,
keeps the probabilities, and has its own backward. The plain path is a few lines that autograd (or a compiler) reads.

Legend: R rows of the grid, C of them in a piece, T queries, S keys, H query heads, G key heads, P = H / G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.attend.call import Call, compute_dtype
from assay.ops.attend.plan import Block, Plan, by_head
from assay.ops.attend.rule import DistanceBias, Scores, softmax, with_sink

# Of one piece and block: the probabilities, and the tanh of the soft cap if there is one.
Kept = tuple[Tensor, Tensor | None]
# A piece of a batch holds about this many logits: fewer calls for small rows, and large rows one at a time in cache.
PIECE = 1 << 19


def refuses(call: Call) -> str | None:
    return None


def run(call: Call, lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """[R, T, H, V], and the log-sum-exp [R, T, H] if asked."""
    call = call.masked()
    rule, plan = call.scores, call.plan
    bias = banded(call)
    if not plan.blocks or (rule.bias is not None and bias is None):
        return plain(call, lse)
    want, kept = lse or rule.sink is not None, call.survivors()
    if call.trains() or (bias is not None and bias.requires_grad and torch.is_grad_enabled()):
        out, total = Blocked.apply(call.q, call.k, call.v, bias, kept, Work(plan, rule, want, True))
    else:
        out, total, _ = forward(call.q, call.k, call.v, bias, kept, Work(plan, rule, want, False))
    if rule.sink is None:
        return out, total
    return with_sink(out, total, rule.sink, lse)


def banded(call: Call) -> Tensor | None:
    """[H, T, S]: a bias by distance, if distance is the same in all rows: one line of biases, shifted row by row."""
    bias, plan = call.scores.bias, call.plan
    # Without blocks (as when traced) there is no shift either, and asking for it would look at the mask.
    if bias is None or not isinstance(bias, DistanceBias) or not plan.blocks or plan.shift is None:
        return None
    assert plan.mask is not None
    _, tokens, entries = plan.mask.shape
    distance = torch.arange(plan.shift - entries + 1, plan.shift + tokens, device=plan.mask.device)
    return bias.by_distance(distance).flip(-1).unfold(-1, entries, 1).flip(-2)


def plain(call: Call, lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """The whole square at once, by autograd."""
    rule, z = call.scores, square(call)
    (rows, heads, tokens, entries), groups = z.shape, call.v.shape[2]
    dtype = compute_dtype(call.q)
    p = softmax(z, rule.sink).to(dtype)
    kept = call.survivors()
    p = p if kept is None else p * rule.factors(kept, dtype)
    v = call.v.transpose(1, 2).to(dtype)
    mixed = p.view(rows, groups, heads // groups * tokens, entries) @ v
    out = mixed.view(rows, heads, tokens, v.shape[-1]).transpose(1, 2).to(call.v.dtype)
    if not lse:
        return out, None
    total = torch.logsumexp(z, -1).transpose(1, 2)
    return out, total if rule.sink is None else torch.logaddexp(total, rule.sink.to(total.dtype))


def square(call: Call) -> Tensor:
    """[R, H, T, S]: all logits of a call that has its mask; -inf where a token does not see."""
    mask, dtype = call.plan.mask, compute_dtype(call.q)
    assert mask is not None
    q, k = (t.transpose(1, 2).to(dtype) for t in (call.q, call.k))
    (rows, heads, tokens, size), (_, groups, entries, _) = q.shape, k.shape
    raw = q.reshape(rows, groups, heads // groups * tokens, size) @ k.transpose(-1, -2)
    q_pos, k_pos = call.positions(slice(None), slice(None))
    z = call.scores.logits(raw.view(rows, heads, tokens, entries), q, q_pos, k_pos)
    return z.masked_fill(~by_head(mask, heads), float("-inf"))


@dataclass(frozen=True)
class Work:
    """How a blocked call is cut up. lse: log-sum-exp wanted; keep: what the backward pass needs is wanted."""

    plan: Plan
    rule: Scores
    lse: bool
    keep: bool

    def pieces(self, heads: int) -> Iterator[slice]:
        """Rows of the grid taken together."""
        assert self.plan.mask is not None
        rows, tokens, entries = self.plan.mask.shape
        step = max(1, PIECE // max(1, heads * tokens * entries))
        return (slice(r, min(rows, r + step)) for r in range(0, rows, step))

    def hide(self, z: Tensor, rows: slice, block: Block) -> None:
        """Add -inf where a query of z [C, H, T, S] must not look."""
        added = self.plan.added
        assert added is not None
        if block.edge < block.end:
            rows = rows if added.shape[0] > 1 else slice(None)
            hidden = added[rows, None, block.first : block.last, block.edge : block.end]
            # In one dtype: of two, torch would make both anew as float32.
            z[..., block.edge - block.low : block.end - block.low].add_(hidden.to(z.dtype))


def logits(a: Tensor, keys: Tensor, rule: Scores, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Scaled and soft-capped a k^T, and with `keep` the tanh of the soft cap, from which its slope is read."""
    z = torch.empty(a.shape[0], a.shape[1], keys.shape[2], dtype=a.dtype)
    scale = rule.scale if rule.softcap is None else rule.scale / rule.softcap
    torch.baddbmm(z, a, keys, beta=0, alpha=scale, out=z)
    if rule.softcap is None:
        return z, None
    z.tanh_()
    return (z * rule.softcap, z) if keep else (z.mul_(rule.softcap), None)


def heads_first(x: Tensor, groups: int) -> Tensor:
    """[C, T, H, K] to [C * G, P * T, K]; a view, which a batched product reads as it is, for one row of G == H."""
    rows, tokens, heads, size = x.shape
    if heads == groups:
        return x.transpose(1, 2).reshape(rows * heads, tokens, size)
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(rows * groups, -1, size)


def tokens_first(x: Tensor, into: Tensor) -> None:
    """[C * G, P * T, K] into [C, T, H, K]."""
    rows, tokens, heads, size = into.shape
    into.copy_(x.view(rows, heads, tokens, size).transpose(1, 2))


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, survive: Tensor | None, work: Work
) -> tuple[Tensor, Tensor | None, list[Kept]]:
    """out [R, T, H, V], log-sum-exp [R, T, H], and what the backward pass needs of each piece and block."""
    (rows, tokens, heads, _), groups, out_dtype, dtype = q.shape, k.shape[2], v.dtype, compute_dtype(q)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out = torch.empty(rows, tokens, heads, v.shape[-1], dtype=out_dtype)
    total = torch.empty(rows, heads, tokens, dtype=dtype) if work.lse else None
    kept: list[Kept] = []
    for piece in work.pieces(heads):
        keys, values = heads_first(k[piece], groups).transpose(1, 2), heads_first(v[piece], groups)
        queries = heads_first(q[piece], heads) if heads == groups else None
        for block in work.plan.blocks:
            part, span = slice(block.first, block.last), slice(block.low, block.high)
            a = queries[:, part] if queries is not None else heads_first(q[piece, part], groups)
            z, curve = logits(a, keys[:, :, span], work.rule, work.keep)
            grid = z.view(piece.stop - piece.start, heads, block.last - block.first, z.shape[-1])
            if bias is not None:
                grid.add_(bias[:, part, span])
            work.hide(grid, piece, block)
            if total is not None:
                total[piece, :, part] = torch.logsumexp(grid, -1)
            torch.softmax(z, -1, out=z)
            if work.plan.dead is not None:
                grid.masked_fill_(work.plan.dead[piece, None, part, None], 0.0)
            if work.keep:
                kept.append((z, curve))
            if survive is not None:
                z = z * work.rule.factors(survive[piece, :, part, span], dtype).view_as(z)
            tokens_first(torch.bmm(z, values[:, span]), out[piece, part])
    return out, None if total is None else total.transpose(1, 2), kept


class Blocked(torch.autograd.Function):
    """dS = P * (dP - rowsum(P * dP) + dlse), all else is products, block by block, on the kept probabilities.

    A soft cap c * t, t = tanh(z / c), bends dS by its slope 1 - t^2. Dropout's factors multiply dP, and P where it is
    multiplied with V.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, survive: Tensor | None, work: Work
    ) -> tuple[Tensor, Tensor | None]:
        ctx.work = work
        out, total, kept = forward(q, k, v, bias, survive, work)
        ctx.save_for_backward(q, k, v, bias, survive, *(p for p, _ in kept), *(curve for _, curve in kept))
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, survive, *rest = ctx.saved_tensors
        kept = list(zip(rest[: len(rest) // 2], rest[len(rest) // 2 :], strict=True))
        if d_out is None:
            d_out = q.new_zeros(*q.shape[:3], v.shape[-1])
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        dtype = compute_dtype(q)
        grads = Gradients(ctx.work, q.to(dtype), k.to(dtype), v.to(dtype), d_out.to(dtype), d_total, d_bias, survive)
        dq, dk, dv = grads.run(kept, (q.dtype, k.dtype, v.dtype))
        return dq, dk, dv, d_bias, None, None


@dataclass(frozen=True)
class Gradients:
    """The backward pass, piece by piece."""

    work: Work
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    d_total: Tensor | None
    d_bias: Tensor | None
    survive: Tensor | None

    def run(self, kept: list[Kept], dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=d) for t, d in zip((self.q, self.k, self.v), dtypes, strict=True))
        blocks = self.work.plan.blocks
        for number, piece in enumerate(self.work.pieces(self.q.shape[2])):
            into = kept[number * len(blocks) : (number + 1) * len(blocks)]
            d_keys, d_values = self._piece(piece, into, dq)
            tokens_first(d_keys, dk[piece])
            tokens_first(d_values, dv[piece])
        return dq, dk, dv

    def _piece(self, piece: slice, kept: list[Kept], dq: Tensor) -> tuple[Tensor, Tensor]:
        """Writes dq of the piece; returns dk and dv as [C * G, S, K]."""
        groups, scale = self.k.shape[2], self.work.rule.scale
        keys, values = heads_first(self.k[piece], groups) * scale, heads_first(self.v[piece], groups).transpose(1, 2)
        d_keys = d_values = None
        for block, (p, curve) in zip(reversed(self.work.plan.blocks), reversed(kept), strict=True):
            part, span = slice(block.first, block.last), slice(block.low, block.high)
            a, d = heads_first(self.q[piece, part], groups), heads_first(self.d_out[piece, part], groups)
            ds, mixed = torch.bmm(d, values[:, :, span]), p
            if self.survive is not None:
                factors = self.work.rule.factors(self.survive[piece, :, part, span], p.dtype).view_as(p)
                ds, mixed = ds.mul_(factors), p * factors
            ds = self._scores(p, ds, piece, part, span)
            if curve is not None:
                torch.ops.aten.tanh_backward(ds, curve, grad_input=ds)
            from_block = torch.bmm(ds.transpose(1, 2), a), torch.bmm(mixed.transpose(1, 2), d)
            tokens_first(torch.bmm(ds, keys[:, span]), dq[piece, part])
            if d_keys is None and block.high - block.low == keys.shape[1]:
                d_keys, d_values = from_block
                continue
            if d_keys is None or d_values is None:
                d_keys, d_values = keys.new_zeros(keys.shape), keys.new_zeros(keys.shape[0], keys.shape[1], d.shape[-1])
            d_keys[:, span].add_(from_block[0])
            d_values[:, span].add_(from_block[1])
        if d_keys is None or d_values is None:
            return keys.new_zeros(keys.shape), values.new_zeros(values.transpose(1, 2).shape)
        return d_keys.mul_(scale), d_values

    def _scores(self, p: Tensor, dp: Tensor, piece: slice, part: slice, span: slice) -> Tensor:
        """The gradient of the logits, written over dp."""
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
        shape = (piece.stop - piece.start, self.q.shape[2], part.stop - part.start, span.stop - span.start)
        if self.d_total is not None:
            ds.view(shape).addcmul_(p.view(shape), self.d_total[piece, part].transpose(1, 2)[..., None])
        if self.d_bias is not None:
            self.d_bias[:, part, span].add_(ds.view(shape).sum(0))
        return ds
