"""Root-mean-square normalisation with a hand-written backward: torch's own is a chain of a dozen kernels on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def rms_norm(x: Tensor, w: Tensor | None, eps: float) -> Tensor:
    """[..., D] -> [..., D] in x's own dtype: x / sqrt(mean(x^2) + eps) * w. Zhang and Sennrich 2019, eq. 4."""
    return _RmsNorm.apply(x, w, eps)
