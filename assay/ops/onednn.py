"""Products in float32 by oneDNN, on processors that MKL does not serve well.

torch's float32 products are MKL's on x86. On a processor that is not Intel's MKL takes narrower vectors than there are:
on 2 threads of a Zen 5 it reaches 160 to 190 GFLOP/s where oneDNN, which torch brings as well, reaches 340 to 420. Both
are sums in float32, in another order.

Legend: N rows, K inputs, O outputs.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.native import PLAIN, unwatched

CPUINFO = Path("/proc/cpuinfo")
OTHERS = ("AuthenticAMD", "HygonGenuine")  # makers of x86 processors, as these call themselves
LEAST = 1 << 20
"""Multiplications that are worth a call of another kind."""


@cache
def better() -> bool:
    """Whether oneDNN's float32 products are the faster ones here: known by the processor's maker, so that the same
    machine always gives the same bits."""
    backends = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not backends or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    told = CPUINFO.read_text("utf-8", "replace") if CPUINFO.is_file() else platform.processor()
    return any(maker in told for maker in OTHERS)


def serves(x: Tensor, w: Tensor, b: Tensor | None) -> bool:
    """Whether this product is one to be made here: large, of float32 on a CPU, and of plain tensors. Who counts, traces
    or compiles operations sees torch's own."""
    given = [t for t in (x, w, b) if t is not None]
    if not unwatched(x) or not all(type(t) in PLAIN and t.dtype is torch.float32 for t in given):
        return False
    return x.numel() * w.shape[0] >= LEAST and better()


def product(x: Float[Tensor, "*n K"], w: Float[Tensor, "O K"], b: Float[Tensor, "O"] | None = None) -> Tensor:
    """x w^T + b, [..., O]; strides are as they may be. With gradients for x, w and b, once."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b)):
        found: Tensor = Product.apply(x, w, b)
        return found
    return _product(x, w, b)


def _product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return found


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _product(x, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, w), (for_x, for_w, for_b) = ctx.saved_tensors, ctx.needs_input_grad
        rows = by_y.reshape(-1, by_y.shape[-1])
        by_x = _product(rows, w.t()).view(x.shape) if for_x else None
        return by_x, _by_w(rows, x.reshape(-1, x.shape[-1])) if for_w else None, rows.sum(0) if for_b else None


def _by_w(by_y: Float[Tensor, "N O"], x: Float[Tensor, "N K"]) -> Float[Tensor, "O K"]:
    """by_y^T x. Of the two factors the first is copied when it is transposed, so that the narrower one is first."""
    if x.shape[1] < by_y.shape[1]:
        return _product(x.t(), by_y.t()).t()
    return _product(by_y.t(), x.t())
