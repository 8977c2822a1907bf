"""The compiled kernels as functions of tensors. Each answers None for what it does not serve: torch does that then.

Legend: N rows of float32 or bfloat16, H query heads, G key heads, S entries of a view, K and V head sizes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.ops.native.elementwise import Elementwise
from assay.ops.native.experts import Experts
from assay.ops.native.scans import Scans
from assay.ops.tape import Kernel

if TYPE_CHECKING:
    from assay.ops.packed import Packed

ROWS = 64  # beyond this many, torch's blocked products are as fast
LANES, WIDEST = 16, 1024  # heads are whole lanes wide, and so many at most
TYPES = (torch.float32, torch.bfloat16)
GATES = ("silu", "gelu_tanh")
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
Numbers = LONG * 19  # of which one query a row leaves the last two out


def _numbers(maps: Iterable[tuple[Tensor, Tensor | None, Tensor, int, int]]) -> ctypes.Array[ctypes.c_long]:
    """Weight, bias, result, outputs and bits of each map, as the kernels read them."""
    told = [
        n for w, b, y, *sizes in maps for n in (w.data_ptr(), 0 if b is None else b.data_ptr(), y.data_ptr(), *sizes)
    ]
    return (LONG * len(told))(*told)


def _rows(x: Tensor) -> tuple[tuple[int, int, int, int], Tensor]:
    """Where x begins, from row to row, rows and their size; and what holds them."""
    x = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    size = x.shape[-1]
    return (x.data_ptr(), x.stride(0) if x.dim() == 2 else size, x.numel() // size, size), x


class Kernels:
    """A loaded library. A row's result has the same bits whatever rows are beside it, with any number of threads."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))

        self.library, self.table = loaded, dict[str, Kernel]()
        self._share = int(loaded.assay_share())  # rows whose sums of a norm's gradient a kernel gives

        def function(name: str, *types: type) -> Kernel:
            made = self.table[name] = Kernel(loaded, name, types)
            return made

        self._linear = function("linear", INT, POINTER, LONG, INT, LONG, POINTER, POINTER, POINTER, LONG)
        self._linears = function("linears", INT, POINTER, LONG, LONG, LONG, POINTER, INT)
        self._many = function("many", POINTER, LONG, LONG, LONG, POINTER, INT)
        self._packed = function("packed", INT, POINTER, LONG, LONG, LONG, POINTER, INT)
        self._grouped = function("grouped", INT, POINTER, LONG, LONG, LONG, POINTER, LONG, POINTER, LONG, POINTER, LONG)
        norm = (INT, POINTER, LONG, LONG, LONG, POINTER, FLOAT, FLOAT, POINTER)
        self._rms_norm, self._rms_norm_back = (
            function("rms_norm", *norm),
            function("rms_norm_back", *norm, POINTER, POINTER),
        )
        self._gated = function("gated", INT, INT, POINTER, POINTER, POINTER, LONG)
        self._turn = function("turn", INT, POINTER, LONG, LONG, LONG, LONG, LONG, LONG, POINTER, POINTER, POINTER)
        self._entropy = function("entropy", INT, POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER)
        self._entropy_back = function("entropy_back", INT, POINTER, LONG, LONG, LONG, POINTER, POINTER, FLOAT, POINTER)
        self._argmax = function("argmax", INT, POINTER, LONG, LONG, LONG, POINTER, POINTER)
        attention = (INT, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, Numbers, FLOAT, FLOAT)
        self._attend, self._attend_tiled = function("attend", *attention), function("attend_tiled", *attention)
        # What a tape makes of torch's own operations.
        for name in ("add", "mul"):
            function(name, INT, POINTER, POINTER, POINTER, LONG)
        function("silu", INT, POINTER, POINTER, LONG)
        function("put", POINTER, POINTER, LONG, POINTER, LONG)
        self.scans, self.experts = Scans(function), Experts(function, ROWS)
        self.elementwise = Elementwise(function)

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """x [..., K] of up to 64 rows with w [N, K], all float32 or all bfloat16, summed in float32."""
        if x.dim() != 2 or (x.shape[1] != 1 and x.stride(1) != 1):
            few = x.dim() and 0 < x.numel() <= ROWS * x.shape[-1]
            found = self.linear(x.reshape(-1, x.shape[-1]).contiguous(), w, b) if few else None
            return None if found is None else found.view(*x.shape[:-1], -1)
        (rows, size), out, dtype = x.shape, w.shape[0], x.dtype
        half = dtype is torch.bfloat16
        if not 0 < rows <= ROWS or not (half or dtype is torch.float32) or w.dtype is not dtype or not size:
            return None
        if not w.is_contiguous() or (b is not None and (b.dtype is not dtype or not b.is_contiguous())):
            return None
        y = x.new_empty(rows, out)  # much of the time of a small map would be `torch.empty` with a shape to be made
        bias = None if b is None else b.data_ptr()
        self._linear(half, x.data_ptr(), x.stride(0), rows, size, w.data_ptr(), bias, y.data_ptr(), out)
        return y

    def linears(self, x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor] | None:
        """As `linear`, the same x with each of these weights and biases, in one call."""
        (rows, size), dtype = x.shape if x.dim() == 2 else (0, 0), x.dtype
        if not 0 < rows <= ROWS or not size or dtype not in TYPES or (size != 1 and x.stride(1) != 1):
            return None
        if any(t is not None and (t.dtype is not dtype or not t.is_contiguous()) for one in maps for t in one):
            return None
        found = [x.new_empty(rows, w.shape[0]) for w, _ in maps]
        numbers = _numbers((w, b, y, y.shape[1], 0) for (w, b), y in zip(maps, found, strict=True))
        self._linears(dtype is torch.bfloat16, x.data_ptr(), x.stride(0), rows, size, numbers, len(maps))
        return found

    def many(self, x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor] | None:
        """bfloat16 x [..., K] of more than 64 rows with each of these weights and biases, in float32, rounded once. A
        row's bits are the same in any company of so many, and not those that it has among fewer."""
        rows = x.reshape(-1, x.shape[-1]) if x.dim() > 2 else x
        if rows.dim() != 2 or rows.shape[0] <= ROWS or not rows.shape[1]:
            return None
        given = (t for one in maps for t in one if t is not None)
        if any(t.dtype is not torch.bfloat16 or not t.is_contiguous() for t in given) or x.dtype is not torch.bfloat16:
            return None
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        count, size = rows.shape
        found = [x.new_empty(*x.shape[:-1], w.shape[0]) for w, _ in maps]
        numbers = _numbers((w, b, y, y.shape[-1], 0) for (w, b), y in zip(maps, found, strict=True))
        self._many(rows.data_ptr(), rows.stride(0), count, size, numbers, len(maps))
        return found

    def packed(self, x: Tensor, maps: Sequence[tuple[Packed, Tensor | None]]) -> list[Tensor] | None:
        """x [..., K] of any number of rows with each of these weights and biases; x is rounded once for all."""
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
        dtype, (count, size) = x.dtype, rows.shape
        if dtype not in TYPES or not count or not size:
            return None
        if any(b is not None and (b.dtype is not dtype or not b.is_contiguous()) for _, b in maps):
            return None
        found = [x.new_empty(count, w.out) for w, _ in maps]
        numbers = _numbers((w.codes, b, y, w.out, w.bits) for (w, b), y in zip(maps, found, strict=True))
        self._packed(dtype is torch.bfloat16, rows.data_ptr(), rows.stride(0), count, size, numbers, len(maps))
        return found if x.dim() == 2 else [y.view(*x.shape[:-1], -1) for y in found]

    def grouped(self, x: Tensor, w: Packed, counts: Tensor) -> Tensor | None:
        """Rows x [M, K] sorted by expert, counts[e] of them for each, with the weights [E, N, K] of theirs."""
        dtype, (rows, size) = x.dtype, x.shape
        if dtype not in TYPES or not rows or not size or counts.dtype != torch.int64:
            return None
        x, counts = x.contiguous(), counts.contiguous()
        y = x.new_empty(rows, w.out)
        given = (x.data_ptr(), size, rows, size, w.codes.data_ptr(), w.bits, counts.data_ptr(), *w.experts)
        self._grouped(dtype is torch.bfloat16, *given, y.data_ptr(), w.out)
        return y

    def norms(self, x: Tensor, w: Tensor | None) -> bool:
        """Whether `rms_norm` and its gradient serve."""
        fits = w is None or (w.dtype is x.dtype and w.is_contiguous())
        return x.dtype in TYPES and x.numel() > 0 and fits

    def rms_norm(self, x: Tensor, w: Tensor | None, eps: float, shift: float) -> Tensor | None:
        """x / sqrt(mean(x^2) + eps) * (w + shift) over the last axis, computed in float32."""
        if not self.norms(x, w):
            return None
        rows, _x = _rows(x)
        y = x.new_empty(x.shape)
        weight = None if w is None else w.data_ptr()
        self._rms_norm(x.dtype is torch.bfloat16, *rows, weight, shift, eps, y.data_ptr())
        return y

    def rms_norm_back(self, x: Tensor, w: Tensor | None, eps: float, shift: float, by: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and w, the latter in float32, from that of `rms_norm`."""
        rows, _x = _rows(x)
        by, dx, dw = by.contiguous(), x.new_empty(x.shape), None
        if w is not None:
            dw = x.new_empty(-(-rows[2] // self._share), rows[3], dtype=torch.float32)
        weight, sums = (None if t is None else t.data_ptr() for t in (w, dw))
        self._rms_norm_back(x.dtype is torch.bfloat16, *rows, weight, shift, eps, by.data_ptr(), dx.data_ptr(), sums)
        return (dx,) if dw is None else (dx, dw.sum(0))

    def argmax(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The largest of each row of x [N, V] in float32, and where it stands first; of a row with a NaN, the first."""
        if x.dtype not in TYPES or x.dim() != 2 or x.stride(1) != 1 or not x.shape[1]:
            return None
        values, places = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.int64)
        half, to = x.dtype is torch.bfloat16, (values.data_ptr(), places.data_ptr())
        self._argmax(half, x.data_ptr(), x.stride(0), *x.shape, *to)
        return values, places

    def gated(self, act: str, x: Tensor, u: Tensor) -> Tensor | None:
        """act(x) * u of two dense tensors of one shape, for act silu and gelu_tanh, rounded after either step."""
        dtype = x.dtype
        if act not in GATES or dtype not in TYPES or u.dtype is not dtype or u.shape != x.shape or not x.numel():
            return None
        if not x.is_contiguous() or not u.is_contiguous():
            return None
        y = torch.empty_like(x)
        given = (x.data_ptr(), u.data_ptr(), y.data_ptr(), x.numel())
        self._gated(dtype is torch.bfloat16, act == "gelu_tanh", *given)
        return y

    def entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [N, V] whose rows lie dense: the logarithm of a row's sum of exponentials, and that less the
        target's logit, 0 where targets [N] are below 0; both [N] in float32."""
        all_, nll = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
        given = (logits.data_ptr(), logits.stride(0), *logits.shape, targets.data_ptr())
        self._entropy(logits.dtype is torch.bfloat16, *given, all_.data_ptr(), nll.data_ptr())
        return all_, nll

    def entropy_back(self, logits: Tensor, targets: Tensor, all_: Tensor, by: float) -> Tensor:
        """The gradient of the logits where that of every `nll` is `by`, in their dtype."""
        y = logits.new_empty(logits.shape)
        given = (logits.data_ptr(), logits.stride(0), *logits.shape, targets.data_ptr())
        self._entropy_back(logits.dtype is torch.bfloat16, *given, all_.data_ptr(), by, y.data_ptr())
        return y

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """x [N, H, K] turned by cos [N, 1, K] and sin [N, 1, K/2 or less] of float32, in half-split pairs."""
        if x.dim() != 3 or x.dtype not in TYPES or x.stride(2) != 1 or not x.numel():
            return None
        rows, heads, size = x.shape
        half = sin.shape[-1]
        if cos.shape != (rows, 1, size) or sin.shape != (rows, 1, half) or 2 * half > size:
            return None
        if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (cos, sin)):
            return None
        y = x.new_empty(rows, heads, size)
        strides = (x.stride(0), x.stride(1), rows, heads, size, half)
        self._turn(x.dtype is torch.bfloat16, x.data_ptr(), *strides, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
        return y

    def attend(
        self,
        q: Tensor,
        stored: tuple[Tensor, Tensor],
        seen: Tensor,
        scale: float,
        softcap: float | None = None,
        sink: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor | None:
        """softmax(scores) v for q [N, H, K], one query a sequence, over `stored` k [N, S, G, K] and v [N, S, G, V];
        seen [N, S] says which entries count. A row that sees nothing gives 0. With a table [N, P] of int64 the keys and
        values stand in pages [_, S / P, G, .], of which row n has those of table[n], and are read there."""
        (rows, _, size), width = q.shape, stored[1].shape[3]
        if not 0 < rows <= ROWS or size % LANES or width % LANES or max(size, width) > WIDEST:
            return None
        return self._attended(self._attend, q, stored, seen[:, None], (scale, softcap, sink), table)

    def attend_tiled(
        self,
        q: Tensor,
        stored: tuple[Tensor, Tensor],
        seen: Tensor,
        scale: float,
        softcap: float | None = None,
        sink: Tensor | None = None,
        table: Tensor | None = None,
    ) -> Tensor | None:
        """As `attend`, with any number of queries a row: q [R * T, H, K] and seen [R, T, S], and any sizes of heads.
        Products and sums in float32, tile by tile: to a few roundings of the definition. What stands in a tile of
        which somebody sees something must be finite."""
        return self._attended(self._attend_tiled, q, stored, seen, (scale, softcap, sink), table)

    def _attended(
        self,
        kernel: Kernel,
        q: Tensor,
        stored: tuple[Tensor, Tensor],
        seen: Tensor,
        rule: tuple[float, float | None, Tensor | None],
        table: Tensor | None,
    ) -> Tensor | None:
        (count, heads, size), dtype, (k, v), (rows, tokens, entries) = q.shape, q.dtype, stored, seen.shape
        page, groups, width = k.shape[1], k.shape[2], v.shape[3]
        if dtype not in TYPES or k.dtype != dtype or v.dtype != dtype or not entries or heads % groups:
            return None
        if not q.stride(2) == k.stride(3) == v.stride(3) == seen.stride(2) == 1:
            return None
        if table is not None and (table.dtype != torch.int64 or table.stride(1) != 1):
            return None
        assert count == rows * tokens and entries == page * (1 if table is None else table.shape[1])
        (scale, softcap, sink), y = rule, q.new_empty(count, heads, width)
        sizes = (seen.stride(0), rows, heads, groups, entries, size, width, page)
        apart = 0 if table is None else table.stride(0)
        strides = (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3])
        numbers = Numbers(*strides, *sizes, apart, tokens, seen.stride(1))
        sinks = None if sink is None else sink.float().contiguous()
        pointers = (None if t is None else t.data_ptr() for t in (q, k, v, table, seen, y, sinks))
        kernel(dtype is torch.bfloat16, *pointers, numbers, scale, softcap or 0.0)
        return y
