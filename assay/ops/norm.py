"""Root-mean-square normalisation with a hand-written backward: torch's own is a chain of a dozen kernels on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.native import serving
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


def rms_norm(x: Tensor, w: Tensor | None, eps: float, shift: float = 0.0) -> Tensor:
    """[..., D] -> [..., D] in x's dtype, computed in float32 or better: x / sqrt(mean(x^2) + eps) * (w + shift).
    Zhang and Sennrich 2019, eq. 4. In inference on a CPU it is one pass of a compiled kernel."""
    native = serving(x)
    own = w.to(x.dtype) if w is not None and x.dtype is torch.float32 else w  # of less precision: the same numbers
    found = None if native is None else native.rms_norm(x, own, eps, shift)
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
    wide = high(x)
    made = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return made if scale == 1.0 else made * scale
