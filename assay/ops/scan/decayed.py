"""The recurrence with a decay and an outer product: S_t = Diag(a_t) S_(t-1) + k_t v_t^T, o_t = q_t S_t.

Linear attention (a = 1; 2006.16236), RetNet (a constant; 2307.08621), Mamba-2 (a number a head; 2405.21060) and GLA (a
number a channel; 2312.06635) are this one function. `recurrent` is the definition; `decayed` computes chunks of tokens
with matrix products and goes from chunk to chunk with the state.

No exponential of a positive number is ever taken: every decay is exp(sum of log decays over an interval), each such sum
is made of the numbers in that interval and not as a difference of two longer ones, and log decays are at most 0. So
nothing overflows, whatever the decay; what is below the smallest float is 0, as it is in the recurrence.

Legend: L lanes of T places, n chunks of c, H heads of v in G groups of R that share q and k, K and V their sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from assay.ops.lanes import Lanes
from assay.ops.native import serving, stepping
from assay.ops.native.scans import Streams
from assay.ops.state import Rows
from assay.spec.values import Cost

CHUNK = 64
MOST = torch.finfo(torch.float32).max


def decayed(
    q: Float[Tensor, "L T Q K"],
    k: Float[Tensor, "L T G K"],
    v: Float[Tensor, "L T H V"],
    log_decay: Float[Tensor, "#L T H ..."] | None,
    past: Float[Tensor, "L H K V"] | Rows,
    lanes: Lanes,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "L T H V"], Float[Tensor, "L H K V"] | None]:
    """Outputs in v's dtype, and the state after each lane where the lanes continue sequences (else None).

    log_decay: at most 0; [.., H] one number a head, [.., H, K] one a channel of the keys (`chunk` is then a power of
    two), None: nothing decays. One lane stands for all. Heads of q and k that are fewer than v's serve equally many
    neighbours. A place that holds nothing has k = v = log_decay = 0. Where lanes have segments, `past` reaches the
    first one only. Half precision is computed in float32. In inference on a CPU a compiled kernel walks from token to
    token, with the state in the nearest cache: products of chunks would take more arithmetic.
    """
    heads, length, dtype = v.shape[2], v.shape[1], v.dtype
    high = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    q, k, v = q.to(high), k.to(high), v.to(high)
    decay = None if log_decay is None else log_decay.to(high)
    found = walked(Streams(q, k, v, decay), past, lanes)
    if found is not None:
        return found[0].to(dtype), found[1]
    state = (past if isinstance(past, Tensor) else past.read()).to(high)
    channels = decay is not None and decay.dim() == 4
    groups = heads if channels or length == 1 else max(q.shape[2], k.shape[2])
    q, k = shared(q, groups), shared(k, groups)
    if length == 1:
        out, end = one_step(q[:, 0], k[:, 0], v[:, 0], None if decay is None else decay[:, 0], state)
        return out[:, None].to(dtype), end if lanes.segment is None else None
    c = min(chunk, length) if not channels else 1 << (min(chunk, length) - 1).bit_length()
    q, k = chunked(q, c).transpose(2, 3), chunked(k, c).transpose(2, 3)
    v = chunked(v, c).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    if decay is None:
        form = undecayed(q, k)
    elif channels:
        form = by_channel(q, k, chunked(decay, c).transpose(2, 3))
    else:
        form = by_head(q, k, chunked(decay, c).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2))
    if lanes.segment is not None:
        form = form.apart(lanes, c)
    out, last = form.run(v, state)
    out = out.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]
    return out.to(dtype), last if lanes.segment is None else None


def walked(given: Streams, past: Float[Tensor, "L H K V"] | Rows, lanes: Lanes) -> tuple[Tensor, Tensor] | None:
    """By the compiled kernel, where it may serve."""
    native = stepping(given.q) if lanes.segment is None else None
    return None if native is None else native.scans.scan(lanes.rows(past), given)


class StateSpace(NamedTuple):
    """What a state space of one number a head reads: queries, keys and values in lanes, the steps dt and their log
    decays, and D, the share of each value that passes by. Dao and Gu 2024, arXiv 2405.21060, eq. 2 and section 7."""

    q: Float[Tensor, "L T G K"]
    k: Float[Tensor, "L T G K"]
    v: Float[Tensor, "L T H V"]
    dt: Float[Tensor, "L T H"]
    decay: Float[Tensor, "L T H"]
    skip: Float[Tensor, "H"]


def state_space(
    given: StateSpace, past: Float[Tensor, "L H K V"] | Rows, lanes: Lanes, chunk: int = CHUNK
) -> tuple[Float[Tensor, "L T H V"], Float[Tensor, "L H K V"] | None]:
    """`decayed` of the values times dt, and D times the values beside it; in dt's dtype, float32 or better."""
    high = given.dt.dtype
    q, k, v, skip = (t.to(high) for t in (given.q, given.k, given.v, given.skip))
    streams = Streams(q, k, v, given.decay, rate=given.dt, skip=skip[None, None])
    found = walked(streams, past, lanes)
    if found is not None:
        return found
    y, end = decayed(q, k, v * given.dt[..., None], given.decay, past, lanes, chunk)
    return y + skip[:, None] * v, end


def steps(
    x: Float[Tensor, "N H"],
    bias: Float[Tensor, "H"],
    a_log: Float[Tensor, "H"],
    low: float = 0.0,
    high: float | None = None,
) -> tuple[Float[Tensor, "N H"], Float[Tensor, "N H"]]:
    """dt = softplus(x + bias) between two bounds, and the log decay -exp(A_log) dt; in float32 or better."""
    native = serving(x)
    found = None if native is None else native.scans.rates(x, bias, a_log, low, MOST if high is None else high)
    if found is not None:
        return found
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = F.softplus(x.to(dtype) + bias.to(dtype)).clamp(low, high)
    return dt, -a_log.to(dtype).exp() * dt


def recurrent(
    q: Float[Tensor, "L T H K"],
    k: Float[Tensor, "L T H K"],
    v: Float[Tensor, "L T H V"],
    log_decay: Float[Tensor, "L T H K"],
    past: Float[Tensor, "L H K V"],
    lanes: Lanes,
) -> tuple[Float[Tensor, "L T H V"], Float[Tensor, "L H K V"]]:
    """The definition, token by token, in the dtype it is given: the oracle of `decayed`."""
    state, outs, fresh = past, [], lanes.fresh()
    for t in range(q.shape[1]):
        if fresh is not None:
            state = torch.where(fresh[:, t, None, None, None], 0.0, state)
        state = log_decay[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] * state).sum(2))
    return torch.stack(outs, 1), state


class Chunks(NamedTuple):
    """What each chunk does, whichever form the decay has; the numbers that are None are 1.

    q reads the state before the chunk and k writes the one after it. A: L, or 1 for all lanes.
    """

    q: Float[Tensor, "L n G c K"]
    k: Float[Tensor, "L n G c K"]
    mix: Float[Tensor, "L n G R c c"]  # from each token's v to each token's output inside the chunk
    reads: Float[Tensor, "A n G R c"] | None  # of the state before the chunk, what is left at each token
    writes: Float[Tensor, "A n G R c"] | None  # of each token, what is left at the chunk's end
    stays: Float[Tensor, "A n G K1 R 1"] | None  # of the state before the chunk, what is left at its end

    def run(
        self, v: Float[Tensor, "L n G R c V"], state: Float[Tensor, "L H K V"]
    ) -> tuple[Float[Tensor, "L n G R c V"], Float[Tensor, "L H K V"]]:
        groups, each = v.shape[2], v.shape[3]
        written = (v if self.writes is None else v * self.writes[..., None]).transpose(3, 4).flatten(4)
        update = (self.k.mT @ written).unflatten(-1, (each, -1))
        now = state.unflatten(1, (groups, each)).transpose(2, 3)
        before = []
        # Unbound, not indexed: the gradient of each index would be zeros of the whole's size.
        stays = [None] * update.shape[1] if self.stays is None else self.stays.unbind(1)
        for left, added in zip(stays, update.unbind(1), strict=True):
            before.append(now)
            now = now + added if left is None else torch.addcmul(added, now, left)
        carried = (self.q @ torch.stack(before, 1).flatten(4)).unflatten(-1, (each, -1)).transpose(3, 4)
        carried = carried if self.reads is None else carried * self.reads[..., None]
        return carried + self.mix @ v, now.transpose(2, 3).flatten(1, 2)

    def apart(self, lanes: Lanes, c: int) -> Chunks:
        """The same with nothing crossing from one document of a lane to the next."""
        assert lanes.segment is not None
        pad = -lanes.length % c
        rest = lanes.segment[:, -1:].expand(-1, pad)
        segment = torch.cat([lanes.segment, rest], 1).unflatten(1, (-1, c))
        before = F.pad(segment[:, :-1, -1], (1, 0))[..., None]
        inside = (segment[..., :, None] == segment[..., None, :])[:, :, None, None]
        reads = (segment == before)[:, :, None, None]
        writes = (segment == segment[..., -1:])[:, :, None, None]
        stays = (segment[..., -1:] == before)[..., None, None, None]
        return Chunks(
            self.q,
            self.k,
            self.mix * inside,
            masked(self.reads, reads, self.mix),
            masked(self.writes, writes, self.mix),
            masked(self.stays, stays, self.mix),
        )


def undecayed(q: Float[Tensor, "L n G c K"], k: Float[Tensor, "L n G c K"]) -> Chunks:
    return Chunks(q, k, (q @ k.mT).tril()[:, :, :, None], None, None, None)


def by_head(q: Float[Tensor, "L n G c K"], k: Float[Tensor, "L n G c K"], decay: Float[Tensor, "A n G R c"]) -> Chunks:
    """The decay inside a chunk is a matrix a head (2405.21060, section 6)."""
    between = segment_sums(decay)
    mix = (q @ k.mT)[:, :, :, None] * between.exp()
    since = decay.cumsum(-1)
    stays = since[..., -1].exp()[:, :, :, None, :, None]
    return Chunks(q, k, mix, since.exp(), between[..., -1, :].exp(), stays)


def segment_sums(x: Float[Tensor, "*B c"]) -> Float[Tensor, "*B c c"]:
    """[t, j]: x_(j+1) + ... + x_t for j <= t, -inf above. Each is a sum of its own terms: a difference of cumulative
    sums loses what is small behind what is large, and is NaN behind an infinity."""
    c = x.shape[-1]
    below = torch.ones(c, c, dtype=torch.bool, device=x.device).tril(-1)
    terms = torch.where(below, x[..., :, None], 0.0)
    return terms.cumsum(-2).masked_fill(below.mT, -torch.inf)


def by_channel(
    q: Float[Tensor, "L n H c K"], k: Float[Tensor, "L n H c K"], decay: Float[Tensor, "A n H c K"]
) -> Chunks:
    """A decay for each channel does not leave the product over channels, so it goes onto q and k, from a point between
    the two tokens: then it is at most 1 on either side. Neighbouring blocks of 1, 2, 4, ... tokens meet at such a
    point, the beginning of the second one (2312.06635, section 4.3, stops at one level of such blocks).
    """
    mix = (q * k).sum(-1)[..., None, None]
    since = decay[..., None, :]  # in each block, from its beginning through each token
    until = torch.zeros_like(since)  # from behind each token to the block's end
    for _ in range((q.shape[-2] - 1).bit_length()):
        (first, second), (early, late) = halves(since), halves(until)
        size = since.shape[-2]
        reads = halves(q.unflatten(-2, (-1, size)))[1] * second.exp()
        writes = halves(k.unflatten(-2, (-1, size)))[0] * early.exp()
        upper, lower = halves(mix)
        upper = torch.cat([upper, torch.zeros_like(upper)], -1)
        mix = torch.cat([upper, torch.cat([reads @ writes.mT, lower], -1)], -2)
        until = torch.cat([early + second[..., -1:, :], late], -2)
        since = torch.cat([first, second + first[..., -1:, :]], -2)
    since, until = since.squeeze(-3), until.squeeze(-3)
    stays = since[..., -1, :].exp()[..., None, None]
    return Chunks(q * since.exp(), k * until.exp(), mix.squeeze(-3)[:, :, :, None], None, None, stays)


def halves(blocks: Float[Tensor, "*B m s X"]) -> tuple[Tensor, Tensor]:
    """Of m blocks, those at even and those at odd places."""
    even, odd = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    return even, odd


def constant(log_decay: Float[Tensor, "H"], lanes: Lanes) -> Float[Tensor, "A T H"]:
    """The log decay of every place from one for each head: 0 where a place holds nothing."""
    spread = log_decay.expand(1, lanes.length, -1)
    if lanes.filled is None:
        return spread
    held = torch.arange(lanes.length, device=log_decay.device) < lanes.filled[:, None]
    return spread * held[..., None]


def power_of_two(name: str, value: int) -> None:
    """ValueError where a chunk cannot be halved down to one token, which decays by channel need."""
    if value & (value - 1):
        raise ValueError(f"`{name}`: {value}; accepted: a power of two")


def one_step(
    q: Float[Tensor, "L H K"],
    k: Float[Tensor, "L H K"],
    v: Float[Tensor, "L H V"],
    decay: Float[Tensor, "A H ..."] | None,
    state: Float[Tensor, "L H K V"],
) -> tuple[Float[Tensor, "L H V"], Float[Tensor, "L H K V"]]:
    """The recurrence for one token a lane."""
    if decay is not None:
        state = state * decay.exp().reshape(*decay.shape[:2], -1, 1)
    state = state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def shared(x: Float[Tensor, "L T G K"], heads: int) -> Float[Tensor, "L T H K"]:
    """Each head repeated for the neighbours that it serves."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def chunked(x: Float[Tensor, "L T ..."], c: int) -> Float[Tensor, "L n c ..."]:
    """Chunks of c places; behind the last place stand zeros."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % c)).unflatten(1, (-1, c))


def masked(x: Tensor | None, keep: Bool[Tensor, "..."], like: Tensor) -> Tensor:
    return keep.to(like.dtype) if x is None else x * keep


def cost(new: int, heads: int, sizes: tuple[int, int], groups: int, chunk: int, channels: bool = False) -> Cost:
    """FLOPs for `new` tokens of a lane; sizes: (K, V), groups: the heads of q and k.

    The recurrence: k v^T and q S, 2 per multiply-add; decays are elementwise. Executed: inside a chunk the scores and
    their product with v, and for each chunk the product with the state before it and what it adds to it.
    """
    k, v = sizes
    flops = 4 * heads * k * v * new
    if new == 1:
        return Cost(flops, 2 * heads * k * v)
    c = min(chunk, new)
    if channels:
        c = 1 << (c - 1).bit_length()
    scores = heads * c * (c - 1) * k if channels else 2 * groups * c * c * k
    return Cost(flops, -(-new // c) * (scores + 2 * heads * c * c * v + 4 * heads * c * k * v))
