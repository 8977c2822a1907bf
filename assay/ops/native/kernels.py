"""The compiled kernels as functions of tensors. Each answers None for what it does not serve: torch does that then."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

ROWS = 32  # beyond this many, torch's blocked products are as fast
TYPES = (torch.float32, torch.bfloat16)
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float


class Kernels:
    """A loaded library. A row's result has the same bits whatever rows are beside it, with any number of threads."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._linear = loaded.assay_linear
        self._linear.argtypes = [INT, POINTER, LONG, INT, LONG, POINTER, POINTER, POINTER, LONG]
        self._linear.restype = None

    def linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """x [..., K] of up to 32 rows with w [N, K], all float32 or all bfloat16, summed in float32."""
        shape, dtype = x.shape, x.dtype
        size, out = shape[-1], w.shape[0]
        rows = shape[0] if len(shape) == 2 else x.numel() // max(size, 1)
        if not 0 < rows <= ROWS or dtype not in TYPES or w.dtype != dtype or not w.is_contiguous() or not size:
            return None
        if b is not None and (b.dtype != dtype or not b.is_contiguous()):
            return None
        if len(shape) != 2 or x.stride(1) != 1:
            x = x.reshape(rows, size).contiguous()
        y = torch.empty((*shape[:-1], out), dtype=dtype)
        bias = None if b is None else b.data_ptr()
        half = dtype is torch.bfloat16
        self._linear(half, x.data_ptr(), x.stride(0), rows, size, w.data_ptr(), bias, y.data_ptr(), out)
        return y
