"""Attention in tiles with an online softmax: no T x S matrix is ever held, forward or backward.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. Tiling and recomputation: Dao et al. 2022,
arXiv 2205.14135, algorithms 1 and 2; queries in the outer loop of the forward: Dao 2023, arXiv 2307.08691.

Legend: R rows of the grid, T queries, S keys, H query heads, G key heads; lower-case t and s are those of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.attend.call import Call
from assay.ops.attend.plan import TILE, aligned, prefixes


@dataclass
class Traffic:
    """Elements moved between slow memory (whole tensors) and tiles; times the element size it is bytes."""

    read: int = 0
    written: int = 0

    def load(self, x: Tensor) -> Tensor:
        self.read += x.numel()
        return x

    def store(self, into: Tensor, x: Tensor) -> None:
        self.written += into.numel()
        into.copy_(x)

    @property
    def total(self) -> int:
        return self.read + self.written


def naive_traffic(call: Call, backward: bool = False) -> Traffic:
    """Of a forward pass, or of both passes, that writes its squares to slow memory (Dao et al. 2022, algorithms 0, 3).

    Forward: z = q k^T, p = softmax(z), p v. Backward: dv = p^T do, dp = do v^T, dz from p and dp, dq = dz k,
    dk = dz^T q.
    """
    rows, tokens, heads, _ = call.q.shape
    square = rows * heads * tokens * call.k.shape[1]
    out = rows * tokens * heads * call.v.shape[-1]
    given = call.q.numel() + call.k.numel() + call.v.numel()
    if not backward:
        return Traffic(given + 2 * square, 2 * square + out)
    return Traffic(2 * given + 2 * out + 7 * square, given + out + 4 * square)


def refuses(call: Call) -> str | None:
    """Recomputation gives gradients to q, k, v and the sink: a bias that learns, or that reads q, gets none."""
    bias = call.scores.bias
    if bias is None or not torch.is_grad_enabled():
        return None
    q = call.q[:1, :1].transpose(1, 2).detach().requires_grad_()
    q_pos, k_pos = call.positions(slice(0, 1), slice(0, 1))
    term = bias.tile(torch.zeros_like(q[..., :1]), q, q_pos[:1], k_pos[:1])
    return "`tiled` has no gradient for a bias with parameters of its own" if term.requires_grad else None


def run(call: Call, block_q: int = TILE, block_k: int = TILE, traffic: Traffic | None = None) -> tuple[Tensor, Tensor]:
    """[R, T, H, V] and the log-sum-exp [R, T, H], whatever the tile sizes; `traffic` is added to if given."""
    tiles = Tiles(call, block_q, block_k, traffic if traffic is not None else Traffic())
    out, lse = Tiled.apply(call.q, call.k, call.v, call.scores.sink, tiles)
    return out, lse


@dataclass(frozen=True)
class Tiles:
    """A call cut into tiles; all heads and rows of a tile are taken together."""

    call: Call
    block_q: int
    block_k: int
    traffic: Traffic

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a tile has at least one row")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.call.q.dtype == torch.float64 else torch.float32

    def queries(self) -> list[slice]:
        return [slice(i, i + self.block_q) for i in range(0, self.call.q.shape[1], self.block_q)]

    def keys(self) -> list[slice]:
        return [slice(j, j + self.block_k) for j in range(0, self.call.k.shape[1], self.block_k)]

    def seen(self, queries: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The key tiles that somebody in the query tile sees, and the mask of each; None: everybody sees all of it."""
        some, every = self.reach(queries)
        tiles = self.keys()
        for number in np.flatnonzero(some):
            keys = tiles[number]
            mask = None if every[number] else self.call.visible(queries, keys)
            if mask is None or bool(mask.any()):
                yield keys, None if mask is None else mask[:, None]

    @cached_property
    def places(self) -> tuple[np.ndarray, ...]:
        """Sequence and place of the queries [R, T] and of the entries [R, S], on the host."""
        q_seq, q_index, _, k_seq, k_index, _ = aligned(self.call.step, self.call.view.layout)
        return tuple(t.cpu().numpy() for t in (q_seq, q_index, k_seq, k_index))

    @cached_property
    def prefix(self) -> np.ndarray:
        """Length of the prefix of the queries' sequences [R, T], on the host."""
        found = prefixes(self.call.step, self.call.view.layout)
        return np.zeros_like(self.places[1]) if found is None else found.cpu().numpy()

    @cached_property
    def ends(self) -> tuple[np.ndarray, ...]:
        """Lowest and highest sequence, lowest and highest place of each key tile, [R, tiles]."""
        return tuple(end for x in self.places[2:] for end in ends(x, self.block_k))

    def reach(self, queries: slice) -> tuple[np.ndarray, np.ndarray]:
        """For each key tile, [tiles]: whether somebody in the query tile may see some of it, and whether everybody sees
        it all. Decided by the ends of the tiles, so that most masks are never made."""
        sees, (q_seq, q_index, _, k_index) = self.call.sees, self.places
        total = int(k_index.max(initial=-1)) + 1
        low, high = sees.spans(q_index[:, queries], total, self.prefix[:, queries])
        (low, low_last), (high_first, high) = (ends(x, self.block_q) for x in (low, high))
        (seq, seq_last), (k_seq, k_seq_last, k, k_last) = ends(q_seq[:, queries], self.block_q), self.ends
        below = sees.scattered | (k < sees.first)
        some = (k <= high) & ((k_last >= low) | below) & (k_seq <= seq_last) & (k_seq_last >= seq)
        one = (k_seq == k_seq_last) & (seq == seq_last) & (k_seq == seq) & (seq >= 0)
        every = one & (k >= low_last) & (k_last <= high_first)
        return np.asarray(some.any(0)), np.asarray(every.all(0))

    def load(self, x: Tensor, part: slice) -> Tensor:
        """A tile of a [R, T, H, K] tensor as [R, H, t, K]."""
        return self.traffic.load(x[:, part]).transpose(1, 2).to(self.dtype)

    def store(self, into: Tensor, part: slice, x: Tensor) -> None:
        self.traffic.store(into[:, part], x.transpose(1, 2))

    def logits(
        self, q: Tensor, k: Tensor, queries: slice, keys: slice, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Masked logits [R, H, t, s], and the slope of the soft cap there."""
        rule = self.call.scores
        capped = rule.capped(by_group(q, k.shape[1]) @ k.transpose(-1, -2)).view(*q.shape[:3], -1)
        slope = None if rule.softcap is None else 1 - (capped / rule.softcap) ** 2
        z = capped if rule.bias is None else rule.bias.tile(capped, q, *self.call.positions(queries, keys))
        return z if mask is None else z.masked_fill(~mask, float("-inf")), slope


def ends(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest of each tile of [R, N], [R, tiles]."""
    first = np.arange(0, x.shape[1], block)
    return np.minimum.reduceat(x, first, axis=1), np.maximum.reduceat(x, first, axis=1)


def by_group(x: Tensor, groups: int) -> Tensor:
    """[R, H, t, K] as [R, G, H / G * t, K]: the heads of a group share its keys."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


class Tiled(torch.autograd.Function):
    """Saves q, k, v, the output and its log-sum-exp; the probabilities are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, tiles: Tiles) -> tuple[Tensor, Tensor]:
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
        lse = torch.empty(q.shape[:3], dtype=tiles.dtype, device=v.device)
        for queries in tiles.queries():
            o, total = softmax_tile(tiles, q, k, v, sink, queries)
            tiles.store(out, queries, o)
            tiles.store(lse, queries, total)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.tiles = tiles
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        dq, dk, dv = (torch.zeros_like(t, dtype=tiles.dtype) for t in (q, k, v))
        d_sink = torch.zeros(q.shape[2], dtype=tiles.dtype, device=q.device)
        rows = (q, d_out, out, d_lse[..., None], lse.where(lse.isfinite(), 0.0)[..., None])
        for queries in tiles.queries():
            q_tile, d_tile, out_tile, d_lse_tile, lse_tile = (tiles.load(t, queries) for t in rows)
            # rowsum(p * dp) == rowsum(out * d_out): one number a row instead of a pass over the probabilities.
            inner_tile = (out_tile * d_tile).sum(-1, keepdim=True) - d_lse_tile
            if sink is not None:
                d_sink -= (torch.exp(sink.to(tiles.dtype).view(-1, 1, 1) - lse_tile) * inner_tile).sum((0, 2, 3))
            dq_tile = torch.zeros_like(q_tile)
            for keys, mask in tiles.seen(queries):
                k_tile, v_tile = tiles.load(k, keys), tiles.load(v, keys)
                z, slope = tiles.logits(q_tile, k_tile, queries, keys, mask)
                p = torch.exp(z - lse_tile)
                groups = k.shape[2]
                dp = (by_group(d_tile, groups) @ v_tile.transpose(-1, -2)).view_as(p)
                ds = p * (dp - inner_tile) * tiles.call.scores.scale
                ds = ds if slope is None else ds * slope
                p, ds = by_group(p, groups), by_group(ds, groups)
                dq_tile += (ds @ k_tile).view_as(dq_tile)
                for total, add in ((dk, ds.mT @ by_group(q_tile, groups)), (dv, p.mT @ by_group(d_tile, groups))):
                    tiles.store(total, keys, tiles.load(total, keys) + add)
            tiles.store(dq, queries, dq_tile)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if sink is None else d_sink.to(sink.dtype), None


def softmax_tile(
    tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, queries: slice
) -> tuple[Tensor, Tensor]:
    """Output [R, H, t, V] and log-sum-exp [R, H, t] of a query tile.

    Maximum and sum grow key tile by key tile, from the sink if there is one. When the maximum rises from m to m', what
    was summed so far is worth exp(m - m') as much.
    """
    q_tile = tiles.load(q, queries)
    rows, heads, tokens, _ = q_tile.shape
    top = q_tile.new_full((rows, heads, tokens, 1), float("-inf"))
    total, out = torch.zeros_like(top), q_tile.new_zeros(rows, heads, tokens, v.shape[-1])
    if sink is not None:
        top, total = sink.to(tiles.dtype).view(1, -1, 1, 1).expand_as(top), torch.ones_like(top)
    lowest = torch.finfo(tiles.dtype).min
    for keys, mask in tiles.seen(queries):
        k_tile, v_tile = tiles.load(k, keys), tiles.load(v, keys)
        z, _ = tiles.logits(q_tile, k_tile, queries, keys, mask)
        new = torch.maximum(top, z.amax(-1, keepdim=True))
        base = new.clamp(min=lowest)  # so far nothing is visible: exp(-inf - lowest) is 0, exp(-inf + inf) is not
        p, fade = torch.exp(z - base), torch.exp(top - base)
        total = total * fade + p.sum(-1, keepdim=True)
        out = out * fade + (by_group(p, k.shape[2]) @ v_tile).view_as(out)
        top = new
    safe = total.where(total > 0, 1.0)
    return out / safe, (top + torch.log(safe))[..., 0]
