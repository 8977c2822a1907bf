"""Recurrences of an outer product, with a decay, a correction or both, one token after another on a GPU.

As `native/scans.h` on a CPU: a program keeps some columns of one head's state in registers and walks through the
tokens; every form in `assay/ops/scan` but the elementwise one is this one kernel. Run in Triton's interpreter and
compiled for sm_90 in the tests, not on hardware.

Legend: L lanes of T places, H heads, K and V channels of a head's keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.ops.native.scans import Rows, Streams, dense, stream

MOST = 64  # tokens: beyond them chunks have products of matrices. Where the two meet was not measured
COLUMNS, NUMBERS = 32, 1 << 13  # of a state that one program holds: columns, and numbers


class Stream(NamedTuple):
    """The first number, strides of lanes, tokens and heads, and how many heads share one of these."""

    base: Any
    lane: int
    token: int
    head: int
    shared: int


class Given(NamedTuple):
    """`Streams`, in its order; what is left out stands for any of them, and is not read."""

    q: Stream
    k: Stream
    v: Stream
    decay: Stream
    a: Stream
    b: Stream
    s: Stream
    rate: Stream
    skip: Stream


class States(NamedTuple):
    """The pool [_, H, K, V], the place of each lane's state in it, outputs [L, T, H, V] and states at the end."""

    pool: Any
    index: Any
    y: Any
    end: Any
    tokens: int


class Sizes(NamedTuple):
    """What the kernel is compiled for; size: of keys, wide: the next power of two, width: of values. late: as in
    `Updates`. The others say what is there."""

    heads: int
    size: int
    width: int
    wide: int
    columns: int
    late: bool
    channels: bool
    decays: bool
    corrects: bool
    writes: bool
    rated: bool
    skips: bool


@triton.jit
@no_type_check
def at(x, lane, t, head):
    return x.base + lane * x.lane + t * x.token + (head // x.shared) * x.head


@triton.jit
@no_type_check
def scan_kernel(given, states, SIZES: tl.constexpr):
    """Some columns of the state of one lane and head."""
    lane, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, SIZES.wide)
    j = tl.program_id(2) * SIZES.columns + tl.arange(0, SIZES.columns)
    key, value = i < SIZES.size, j < SIZES.width
    inside = head * SIZES.size * SIZES.width + i[:, None] * SIZES.width + j
    whole: tl.constexpr = SIZES.heads * SIZES.size * SIZES.width
    held = key[:, None] & value
    state = tl.load(states.pool + tl.load(states.index + lane) * whole + inside, mask=held, other=0.0)
    for t in range(states.tokens):
        before = state
        if SIZES.decays:
            decay = at(given.decay, lane, t, head)
            if SIZES.channels:
                state *= tl.exp(tl.load(decay + i, mask=key, other=0.0))[:, None]
            else:
                state *= tl.exp(tl.load(decay))
        rate = 1.0
        if SIZES.rated:
            rate = tl.load(at(given.rate, lane, t, head))
        if SIZES.corrects:
            a = tl.load(at(given.a, lane, t, head) + i, mask=key, other=0.0)
            found = tl.sum(a[:, None] * (state if SIZES.late else before), 0)
            s = tl.load(at(given.s, lane, t, head) + j, mask=value, other=0.0)
            p = rate * (s - found) if SIZES.rated else s + found
            b = tl.load(at(given.b, lane, t, head) + i, mask=key, other=0.0)
            state += b[:, None] * p
        if SIZES.writes:
            k = tl.load(at(given.k, lane, t, head) + i, mask=key, other=0.0)
            v = tl.load(at(given.v, lane, t, head) + j, mask=value, other=0.0)
            state += k[:, None] * (v if SIZES.corrects else rate * v)
        q = tl.load(at(given.q, lane, t, head) + i, mask=key, other=0.0)
        out = tl.sum(q[:, None] * state, 0)
        if SIZES.skips:
            out += tl.load(at(given.skip, lane, t, head)) * v
        row = (lane * states.tokens + t) * SIZES.heads + head
        tl.store(states.y + row * SIZES.width + j, out, mask=value)
    tl.store(states.end + lane * whole + inside, state, mask=held)


def scan(past: Rows, given: Streams, late: bool = False) -> tuple[Tensor, Tensor] | None:
    """`Scans.scan` of the CPU: outputs [L, T, H, V] and the states [L, H, K, V] behind the last token, of float32. None
    for other types, for more than 64 tokens and for heads of more than 256 keys."""
    (_, heads, keys, values), lanes, tokens = past.pool.shape, len(past.index), given.q.shape[1]
    wide = max(16, triton.next_power_of_2(keys))
    if tokens > MOST or wide > NUMBERS // COLUMNS or not lanes * tokens * heads * values:
        return None
    if any(t is not None and t.dtype != torch.float32 for t in (past.pool, *given)):
        return None
    pool, kept = past.pool.contiguous(), [None if t is None else dense(t) for t in given]
    y, end = pool.new_empty(lanes, tokens, heads, values), pool.new_empty(lanes, heads, keys, values)
    read = Given(*(Stream(pool, 0, 0, 0, 1) if t is None else Stream(t, *stream(t, heads)[1:]) for t in kept))
    channels = given.decay is not None and given.decay.dim() == 4 and given.decay.shape[3] == keys
    there = (t is not None for t in (given.decay, given.a, given.k, given.rate, given.skip))
    sizes = Sizes(heads, keys, values, wide, COLUMNS, late, channels, *there)
    grid = (lanes, heads, triton.cdiv(values, COLUMNS))
    scan_kernel[grid](read, States(pool, past.index, y, end, tokens), SIZES=sizes)
    return y, end
