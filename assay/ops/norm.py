"""Root-mean-square normalisation with a hand-written backward: torch's own is a chain of a dozen kernels on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.native import Kernels, serving, training
from assay.ops.precision import high


class _RmsNorm(torch.autograd.Function):
    """y = n w with n = x r, r = 1 / sqrt(mean(x^2) + eps): dx = r (g w - n mean(g w n)), dw = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, eps: float) -> Tensor:
        size = x.shape[-1]
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(size).add(eps).rsqrt()
        n = x * r
        ctx.save_for_backward(n, r, w)
        return n if w is None else n * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        n, r, w = ctx.saved_tensors
        g = grads[0]
        product = g * n
        dw = None if w is None else product.flatten(0, -2).sum(0)
        inner = product if w is None else product * w
        dx = torch.addcmul(g if w is None else g * w, n, inner.mean(-1, keepdim=True), value=-1).mul(r)
        return dx, dw, None


class _Fused(torch.autograd.Function):
    """The same by the compiled kernels, a pass each. Kept is x as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, eps: float, shift: float, native: Kernels) -> Tensor:
        ctx.native, ctx.rule = native, (eps, shift)
        ctx.save_for_backward(x, w)
        y = native.rms_norm(x, w, eps, shift)
        assert y is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        dx, *dw = ctx.native.rms_norm_back(x, w, *ctx.rule, grads[0])
        return dx, None if w is None else dw[0].to(w.dtype), None, None, None


def rms_norm(x: Tensor, w: Tensor | None, eps: float, shift: float = 0.0) -> Tensor:
    """[..., D] -> [..., D] in x's dtype, computed in float32 or better: x / sqrt(mean(x^2) + eps) * (w + shift).
    Zhang and Sennrich 2019, eq. 4. On a CPU it is one pass of a compiled kernel, and its gradient another."""
    own = w.to(x.dtype) if w is not None and x.dtype is torch.float32 else w  # of less precision: the same numbers
    given = (x,) if own is None else (x, own)
    native, trains = training(*given, half=True), torch.is_grad_enabled() and any(t.requires_grad for t in given)
    found = None if native is None or trains else native.rms_norm(x, own, eps, shift)
    if native is not None and trains and native.norms(x, own):
        found = _Fused.apply(x, own, eps, shift, native)
    if found is not None:
        return found
    wide = high(x)
    w = None if w is None else w.to(wide.dtype)
    w = w + shift if w is not None and shift else w
    return _RmsNorm.apply(wide, w, eps).to(x.dtype)


def unit(x: Float[Tensor, "L T H K"], eps: float, scale: float = 1.0) -> Float[Tensor, "L T H K"]:
    """scale x / sqrt(|x|^2 + eps) over the last axis, in float32 or better."""
    native = serving(x)
    found = None if native is None else native.scans.unit(x, eps, scale)
    if found is not None:
        return found
    size = x.shape[-1]
    return rms_norm(high(x), None, eps / size) * (scale * size**-0.5)
