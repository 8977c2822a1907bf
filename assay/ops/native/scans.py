"""Compiled recurrences and what stands before them, as functions of tensors, for `ops.scan` and `ops.conv`.

Legend: L lanes of T places, H heads, K and V channels of a head's keys and values, C channels, J taps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
Sizes, Taps = LONG * 56, LONG * 20
NOTHING = (0, 0, 0, 0, 1)
TYPES = (torch.float32, torch.bfloat16)


class Streams(NamedTuple):
    """What a scan reads of every token: [L, T, heads, size], the last three [L, T, heads], and a decay of a number a
    head in either form. Of fewer heads than the state's each serves equally many neighbours; one lane or one token
    stands for all. None: left out, and nothing decays."""

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    decay: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    s: Tensor | None = None
    rate: Tensor | None = None
    skip: Tensor | None = None


class Rows(Protocol):
    """States: a pool of them, and the place of each lane's."""

    @property
    def pool(self) -> Tensor: ...

    @property
    def index(self) -> Tensor: ...


class Ends(NamedTuple):
    """What is before a convolution's lanes, in a pool [_, J - 1, C]; how many places of each hold tokens, None: all;
    and where its end goes, [L, J - 1, C]."""

    past: Rows
    filled: Tensor | None
    tail: Tensor


class Act(NamedTuple):
    """silu: a convolution ends in SiLU. wide: its result is of float32."""

    silu: bool = False
    wide: bool = False


class Scans:
    """The kernels of `scans.h`; function: declares one by its name and the types of its arguments."""

    def __init__(self, function: Callable[..., Callable[..., None]]) -> None:
        self._scan = function("scan", Sizes)
        self._conv = function("conv", INT, Taps)
        sizes, ends = (LONG, LONG, LONG), (POINTER, POINTER)
        self._rates = function("rates", INT, POINTER, *sizes, *ends, FLOAT, FLOAT, *ends)
        self._unit = function("unit", INT, POINTER, LONG, LONG, *sizes, FLOAT, FLOAT, POINTER)

    def scan(self, past: Rows, given: Streams, late: bool = False) -> tuple[Tensor, Tensor] | None:
        """Outputs [L, T, H, V] and the states [L, H, K, V] behind the last token, all of float32.

        S_t = Diag(w) S_(t-1) + b p^T + k v^T and o = q S + skip v, with w = e^decay and p = s + a S_(t-1), where a
        reads Diag(w) S_(t-1) if `late`. With a rate p = rate (s - a S_(t-1)); without a it multiplies the v of k v^T.
        """
        (_, heads, keys, values), lanes, tokens, decay = past.pool.shape, len(past.index), given.q.shape[1], given.decay
        if any(t is not None and t.dtype != torch.float32 for t in (past.pool, *given)):
            return None
        pool, kept = past.pool.contiguous(), [t if t is None else dense(t) for t in given]
        y, end = pool.new_empty(lanes, tokens, heads, values), pool.new_empty(lanes, heads, keys, values)
        told = [n for t in kept for n in (NOTHING if t is None else stream(t, heads))]
        channels = decay is not None and decay.dim() == 4 and decay.shape[3] == keys
        sizes = (lanes, tokens, heads, keys, values, channels, late)
        ends = (t.data_ptr() for t in (pool, past.index, y, end))
        self._scan(Sizes(*sizes, *told, *ends))
        return y, end

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, ends: Ends, act: Act) -> Tensor | None:
        """`ops.conv.short_conv` of x [L, T, C], with sums in float32; its end is written to `ends.tail`."""
        past, tail, dtype = ends.past, ends.tail, x.dtype
        if dtype not in TYPES or any(t is not None and t.dtype != dtype for t in (weight, bias, past.pool, tail)):
            return None
        x, weight, bias = dense(x), weight.contiguous(), None if bias is None else bias.contiguous()
        (lanes, tokens, width), taps = x.shape, weight.shape[1]
        y = x.new_empty(lanes, tokens, width, dtype=torch.float32 if act.wide else dtype)
        numbers = (lanes, tokens, width, taps, act.silu, act.wide, x.data_ptr(), x.stride(0), x.stride(1))
        before = (past.pool.data_ptr(), *past.pool.stride()[:2], past.index.data_ptr(), place(ends.filled))
        behind = (y.data_ptr(), tail.data_ptr(), *tail.stride()[:2])
        self._conv(dtype is torch.bfloat16, Taps(*numbers, weight.data_ptr(), place(bias), *before, *behind))
        return y

    def rates(self, x: Tensor, bias: Tensor, a_log: Tensor, low: float, high: float) -> tuple[Tensor, Tensor] | None:
        """Of x [N, H]: softplus(x + bias) between the bounds, and -e^a_log times it, in float32."""
        dtype = x.dtype
        if dtype not in TYPES or x.dim() != 2 or not x.numel() or bias.dtype != dtype or a_log.dtype != dtype:
            return None
        x, (rows, heads) = dense(x), x.shape
        steps, decay = (x.new_empty(rows, heads, dtype=torch.float32) for _ in range(2))
        given = (x.data_ptr(), x.stride(0), rows, heads, bias.data_ptr(), a_log.data_ptr(), low, high)
        self._rates(dtype is torch.bfloat16, *given, steps.data_ptr(), decay.data_ptr())
        return steps, decay

    def unit(self, x: Tensor, eps: float, scale: float) -> Tensor | None:
        """scale x / sqrt(|x|^2 + eps) over the last axis of x [L, T, H, K], in float32."""
        if x.dtype not in TYPES or x.dim() != 4 or not x.numel():
            return None
        x = x if x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()
        (lanes, tokens, heads, size), y = x.shape, x.new_empty(x.shape, dtype=torch.float32)
        sizes = (x.stride(1), x.stride(2), lanes * tokens, heads, size)
        self._unit(x.dtype is torch.bfloat16, x.data_ptr(), *sizes, eps, scale, y.data_ptr())
        return y


def dense(t: Tensor) -> Tensor:
    """With a last axis whose numbers lie behind one another."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def stream(t: Tensor, heads: int) -> tuple[int, ...]:
    """Address, strides of lanes, tokens and heads, and how many heads share one of these."""
    lane, token = (0 if t.shape[i] == 1 else t.stride(i) for i in (0, 1))
    return t.data_ptr(), lane, token, t.stride(2), heads // t.shape[2]


def place(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
