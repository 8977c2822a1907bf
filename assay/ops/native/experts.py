"""Compiled products of rows with matrices of their own: the experts that each chose, or one for each head."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from assay.ops.precision import multiplies_bfloat16

POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
TYPES = (torch.float32, torch.bfloat16)


class Experts:
    """The kernel of `experts.h`; function: declares one by its name and the types of its arguments. rows: what is few,
    of tokens or of an expert's rows."""

    def __init__(self, function: Callable[..., Callable[..., None]], rows: int) -> None:
        sizes = (LONG, LONG, LONG, LONG)
        self._chosen, self.rows = function("experts", INT, POINTER, POINTER, *sizes, POINTER, INT), rows
        self._heads = function("heads", INT, INT, POINTER, *sizes, LONG, POINTER, LONG, LONG, LONG, POINTER)

    def chosen(self, x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]], choice: Tensor) -> list[Tensor] | None:
        """Of each map, w [E, F, D] and b [E, F] or None, [N, k, F]: token i of x, [N, D] or [N, k, D] with a row for
        each choice, times the experts that choice [N, k] names for it, 0 .. E-1. All float32 or all bfloat16, summed
        in float32, with no bit from the rows beside it. Up to 64 tokens; also as many as give an expert 64 rows in
        the mean, and any number in float32 under deterministic algorithms, and in bfloat16 where the CPU has no
        product of it. None for what is more, for other types (choice: int64), for weights that are not dense, and
        without rows."""
        (tokens, k), dtype, size = choice.shape, x.dtype, x.shape[-1]
        if dtype not in TYPES or not tokens or not size or choice.dtype != torch.int64:
            return None
        if tokens > self.rows and not self._many(tokens * k / maps[0][0].shape[0], dtype):
            return None
        if any(t is not None and (t.dtype is not dtype or not t.is_contiguous()) for one in maps for t in one):
            return None
        x, choice = x.contiguous(), choice.contiguous()
        found = [x.new_empty(tokens, k, w.shape[1]) for w, _ in maps]
        told = [
            n
            for (w, b), y in zip(maps, found, strict=True)
            for n in (w.data_ptr(), 0 if b is None else b.data_ptr(), y.data_ptr(), w.shape[1], 0)
        ]
        each, rows = tokens * k // (x.numel() // size), tokens * k
        sizes = (each, rows, size, maps[0][0].shape[0])
        given = (x.data_ptr(), choice.data_ptr(), *sizes, (LONG * len(told))(*told), len(maps))
        self._chosen(dtype is torch.bfloat16, *given)
        return found

    def _many(self, each: float, dtype: torch.dtype) -> bool:
        """Whether many rows, `each` of an expert, are multiplied sooner here than by torch, or in float32 shall have
        the same bits with any number of threads."""
        if each <= self.rows:
            return True
        return torch.are_deterministic_algorithms_enabled() if dtype is torch.float32 else not multiplies_bfloat16()

    def heads(self, x: Tensor, w: Tensor, along: bool) -> Tensor | None:
        """[N, H, O]: each head of x [N, H, K] times its matrix of w, [H, O, K], or [H, K, O] where `along`. 1 to 64
        rows N, all float32 or all bfloat16, summed in float32; the last axis of x and of w is dense. None for
        others."""
        (rows, heads, size), dtype, out = x.shape, x.dtype, w.shape[2 if along else 1]
        if not 0 < rows <= self.rows or dtype not in TYPES or w.dtype != dtype or w.stride(2) != 1 or x.stride(2) != 1:
            return None
        y = x.new_empty(rows, heads, out)
        given = (x.data_ptr(), x.stride(0), x.stride(1), rows, heads, size)
        own = (w.data_ptr(), w.stride(0), w.stride(1), out, y.data_ptr())
        self._heads(dtype is torch.bfloat16, along, *given, *own)
        return y
