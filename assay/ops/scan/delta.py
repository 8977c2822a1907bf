"""Recurrences whose state is corrected where it is read: the delta rule and its diagonal-plus-rank-one relatives.

Legend: L lanes of T places, H heads, K key and V value channels, D either 1 or K; n chunks of C tokens, M = L * H
matrices in each; R reads (the correction's and the query's) and P writes (the correction's and a known one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.native import stepping
from assay.ops.native.scans import Streams
from assay.ops.scan.decayed import halves, segment_sums, shared
from assay.ops.state import Rows

CHUNK = 32
"""Tokens taken together: the fastest of 16, 32 and 64 for a training step with 64 channels on one core."""


@dataclass(frozen=True)
class Updates:
    """S_t = Diag(w_t) S_(t-1) + b_t p_t^T + k_t v_t^T with p_t = s_t + a_t S_(t-1), and o_t = q_t S_t; S is [K, V].

    late: a_t reads Diag(w_t) S_(t-1) instead. rate: p_t = rate_t (s_t - a_t S_(t-1)), and q, a and b may have fewer
    heads than s, each for equally many neighbours. log_decay: ln w_t, never above 0, one number a head or one a channel
    of the key. Where it, `a`, `s` and `v` are 0, or it and the rate, the state is left as it was.
    """

    q: Float[Tensor, "L T G K"]
    a: Float[Tensor, "L T G K"]
    b: Float[Tensor, "L T G K"]
    s: Float[Tensor, "L T H V"]
    log_decay: Float[Tensor, "L T H D"]
    k: Float[Tensor, "L T H K"] | None = None
    v: Float[Tensor, "L T H V"] | None = None
    late: bool = False
    rate: Float[Tensor, "L T H"] | None = None

    @property
    def by_head(self) -> bool:
        """One decay for all channels, which what a correction reads has too, and no write but the corrections."""
        return self.late and self.k is None and self.log_decay.shape[-1] == 1

    def plain(self) -> Updates:
        """The same without a rate and with every head."""
        if self.rate is None:
            return self
        heads, rate = self.s.shape[2], self.rate[..., None]
        b = shared(self.b, heads)
        a = b if self.a is self.b else shared(self.a, heads)
        return replace(self, q=shared(self.q, heads), a=-rate * a, b=b, s=rate * self.s, rate=None)

    def streams(self) -> Streams:
        return Streams(self.q, self.k, self.v, self.log_decay, self.a, self.b, self.s, self.rate)

    def each(self, f: Callable[[Tensor], Tensor]) -> Updates:
        """The same with every tensor mapped."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {name: f(x) for name, x in found.items() if isinstance(x, Tensor)}
        return replace(self, **mapped)


def delta_rule(
    q: Float[Tensor, "L T G K"],
    k: Float[Tensor, "L T G K"],
    v: Float[Tensor, "L T H V"],
    beta: Float[Tensor, "L T H"],
    log_decay: Tensor | None = None,
) -> Updates:
    """S_t = (I - beta_t k_t k_t^T) Diag(w_t) S_(t-1) + beta_t k_t v_t^T: what k_t finds moves towards v_t by beta_t.

    log_decay: ln w_t as [L, T, H] (Gated DeltaNet, arXiv 2412.06464, eq. 10) or [L, T, H, K] (Kimi Delta Attention,
    2510.26692, eq. 1); None is w = 1 (DeltaNet, 2406.06484, eq. 3).
    """
    decay = torch.zeros_like(beta) if log_decay is None else log_decay
    return Updates(q, k, k, v, decay if decay.dim() == 4 else decay[..., None], late=True, rate=beta)


def rank_one(
    q: Float[Tensor, "L T H K"],
    removed: tuple[Tensor, Tensor],
    k: Float[Tensor, "L T H K"],
    v: Float[Tensor, "L T H V"],
    log_decay: Float[Tensor, "L T H K"],
) -> Updates:
    """S_t = (Diag(w_t) + b_t a_t^T) S_(t-1) + k_t v_t^T with `removed` = (a, b) (RWKV-7, arXiv 2503.14456, eq. 17)."""
    return Updates(q, *removed, torch.zeros_like(v), log_decay, k, v)


def run(
    updates: Updates,
    past: Float[Tensor, "L H K V"] | Rows,
    segment: Int[Tensor, "L T"] | None = None,
    keeps: bool = False,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "L T H V"], Float[Tensor, "L H K V"] | None]:
    """Outputs in q's dtype, and the state at each lane's end where it is kept.

    segment: numbers of documents in a lane; none sees another, and only the first sees `past`. chunk: tokens that are
    taken together, which changes speed and not results. Half precision is summed in the state's dtype. In inference on
    a CPU a compiled kernel takes one token after another, with the state in the nearest cache.
    """
    dtype = updates.q.dtype
    pool = past if isinstance(past, Tensor) else past.pool
    high = pool.dtype if dtype in (torch.bfloat16, torch.float16) else dtype
    given = updates.each(lambda x: x.to(high))
    native = stepping(given.q) if segment is None else None
    rows = Rows(past, torch.arange(len(past))) if isinstance(past, Tensor) else past
    found = None if native is None else native.scans.scan(rows, given.streams(), given.late)
    if found is None:
        form = recurrent if given.q.shape[1] == 1 else chunkwise
        found = form(given, (past if isinstance(past, Tensor) else past.read()).to(high), segment, chunk)
    out, end = found
    return out.to(dtype), end if keeps else None


def recurrent(u: Updates, past: Tensor, segment: Tensor | None = None, chunk: int = 1) -> tuple[Tensor, Tensor]:
    """One token after another, as the equation is written."""
    u, state, rows = u.plain(), past, list[Tensor]()
    moments = zip(*(x.unbind(1) for x in (u.q, u.a, u.b, u.s, u.log_decay.exp())), strict=True)
    added = [] if u.k is None or u.v is None else list(zip(u.k.unbind(1), u.v.unbind(1), strict=True))
    for t, (q, a, b, s, w) in enumerate(moments):
        if segment is not None and t > 0:
            state = torch.where((segment[:, t] == segment[:, t - 1])[:, None, None, None], state, 0.0)
        decayed = state * w[..., None]
        p = s[..., None, :] + a[..., None, :] @ (decayed if u.late else state)
        state = torch.addcmul(decayed, b[..., None], p)
        state = torch.addcmul(state, added[t][0][..., None], added[t][1][..., None, :]) if added else state
        rows.append((q[..., None, :] @ state)[..., 0, :])
    return torch.stack(rows, 1), state


def chunkwise(updates: Updates, past: Tensor, segment: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """The corrections P of a chunk solve (I - A) P = s + A' V + a S_0, one triangular system (the UT transform, arXiv
    2406.06484, section 3.2); only the state goes from chunk to chunk, and all else is done for all of them at once."""
    updates = updates.plain()
    lanes, tokens, heads, keys = updates.q.shape
    size = chunk_size(tokens, chunk, updates.by_head)
    u = updates.each(lambda x: chunked(x, size))
    reads, writes = torch.stack([u.a, u.q], -3), torch.stack([u.b] if u.k is None else [u.b, u.k], -3)
    form = by_head(reads, writes, u.log_decay) if u.by_head else by_channel(reads, writes, u.log_decay, u.late)
    if segment is not None:
        form = form.apart(segment, heads)
    source = u.s
    known: tuple[Tensor, ...] = ()
    if u.v is not None:
        seen = form.mix[:, :, :, 1] @ u.v[:, :, None]
        known = (form.writes[:, :, 1].mT @ u.v).unbind(0)
        source = source + seen[:, :, 0]
    system, right = -form.mix[:, :, 0, 0], torch.cat([form.reads[:, :, 0], source], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    each = (*solved.split([keys, source.shape[-1]], -1), form.writes[:, :, 0].mT, form.stays)
    state, states, corrections = past.flatten(0, 1), [], []
    for i, (reads, source, writes, stays) in enumerate(zip(*(x.unbind(0) for x in each), strict=True)):
        states.append(state)
        corrections.append(torch.baddbmm(source, reads, state))
        state = torch.baddbmm(state * stays, writes, corrections[-1])
        state = state + known[i] if known else state
    out = form.reads[:, :, 1] @ torch.stack(states) + form.mix[:, :, 1, 0] @ torch.stack(corrections)
    out = out if u.v is None else out + seen[:, :, 1]
    out = out.unflatten(1, (lanes, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return out[:, :tokens], state.unflatten(0, (lanes, heads))


def chunk_size(tokens: int, chunk: int, by_head: bool) -> int:
    """Of lanes with this many places: a power of two where `by_channel` halves it."""
    size = min(chunk, tokens)
    return size if by_head else 1 << (size - 1).bit_length()


def chunked(x: Float[Tensor, "L T H C"], size: int) -> Tensor:
    """[L, T, H, C] -> [n, M, size, C]; zeros after the end."""
    if extra := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, extra))
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(1, 2)


class Chunks(NamedTuple):
    """What chunks do with a decay of either form."""

    reads: Float[Tensor, "n M R C K"]  # of the state before the chunk, with what is left of it then
    writes: Float[Tensor, "n M P C K"]  # with what is left of them at the chunk's end
    mix: Float[Tensor, "n M R P C C"]  # from each token's write to each token's read
    stays: Float[Tensor, "n M D 1"]  # of the state before the chunk, what is left at its end

    def apart(self, segment: Int[Tensor, "L T"], heads: int) -> Chunks:
        """The same with nothing crossing from one document of a lane to the next."""
        size = self.mix.shape[-1]
        whole = torch.cat([segment, segment[:, -1:].expand(-1, -segment.shape[1] % size)], 1)
        own = whole.unflatten(1, (-1, size)).transpose(0, 1).repeat_interleave(heads, 1)
        before = torch.cat([own[:1, :, :1], own[:-1, :, -1:]])
        first, last = (own == before)[:, :, None, :, None], (own == own[..., -1:])[:, :, None, :, None]
        same = (own[..., :, None] == own[..., None, :])[:, :, None, None]
        return Chunks(self.reads * first, self.writes * last, self.mix * same, self.stays * first[:, :, 0, -1:])


def by_head(reads: Tensor, writes: Tensor, decay: Float[Tensor, "n M C 1"]) -> Chunks:
    """The decay between two tokens is one number for all channels (2412.06464, section 3.3); reads are late. What a
    correction reads of its own token stays in `mix`: the triangular solve does not look at the diagonal."""
    between = segment_sums(decay[..., 0])
    mix = products(reads, writes) * between.exp()[:, :, None, None]
    since, until = decay.cumsum(-2), between[..., -1, :, None]
    reads, writes = (x * left.exp()[:, :, None] for x, left in ((reads, since), (writes, until)))
    return Chunks(reads, writes, mix, since[..., -1:, :].exp())


def by_channel(reads: Tensor, writes: Tensor, decay: Float[Tensor, "n M C D"], late: bool) -> Chunks:
    """A decay for each channel goes onto reads and writes, from a point between the two: then either is at most 1.
    Neighbouring blocks of 1, 2, 4, ... tokens meet at the beginning of the second one, as in `decayed`."""
    since = decay[:, :, None, :, None]  # in each block, from its beginning to each read
    since = since if late else torch.cat([torch.zeros_like(since), since], 2)
    until = torch.zeros_like(decay)[:, :, None, :, None]  # in each block, from behind each write to its end
    mix = (reads[:, :, :, None] * writes[:, :, None]).sum(-1)
    mix = torch.cat([torch.zeros_like(mix[:, :, :1]), mix[:, :, 1:]], 2)[..., None, None]
    for _ in range((decay.shape[-2] - 1).bit_length()):
        (first, second), (early, behind) = halves(since), halves(until)
        size = since.shape[-2]
        across = products(
            (halves(reads.unflatten(-2, (-1, size)))[1] * second.exp()).transpose(2, 3),
            (halves(writes.unflatten(-2, (-1, size)))[0] * early.exp()).transpose(2, 3),
        )
        upper, lower = halves(mix)
        upper = torch.cat([upper, torch.zeros_like(upper)], -1)
        mix = torch.cat([upper, torch.cat([across.movedim(2, 4), lower], -1)], -2)
        until = torch.cat([early + second[:, :, -1:, :, -1:], behind], -2)
        since = torch.cat([first, second + first[:, :, -1:, :, -1:]], -2)
    since, until = since.squeeze(-3), until.squeeze(-3)
    return Chunks(reads * since.exp(), writes * until.exp(), mix.squeeze(-3), since[:, :, -1, -1, :, None].exp())


def products(x: Float[Tensor, "*B R C K"], y: Float[Tensor, "*B P C K"]) -> Float[Tensor, "*B R P C C"]:
    """x_t . y_j of every read and write in one product."""
    found = x.flatten(-3, -2) @ y.flatten(-3, -2).mT
    return found.unflatten(-1, y.shape[-3:-1]).unflatten(-3, x.shape[-3:-1]).transpose(-3, -2)


def executed(tokens: int, heads: int, sizes: tuple[int, int], chunk: int, by_head: bool = True, writes: int = 1) -> int:
    """FLOPs of the matrix products of `run` for one lane; sizes: K and V, writes: 2 of `rank_one`. The triangular solve
    is none of them."""
    k, v = sizes
    if tokens == 1:
        return 4 * heads * k * v
    size = chunk_size(tokens, chunk, by_head)
    scores = 4 * size * size * writes * k if by_head else 2 * size * (size - 1) * writes * k
    states = 2 * size * k * v * (writes + 2)
    mixed = 2 * size * size * v * (2 * writes - 1)
    return heads * -(-tokens // size) * (scores + states + mixed)
