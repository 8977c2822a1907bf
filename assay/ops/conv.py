"""Short causal convolutions, one filter a channel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from assay.ops.lanes import Lanes
from assay.ops.native import serving


def short_conv(
    x: Float[Tensor, "L T C"],
    weight: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"] | None,
    past: Float[Tensor, "L K1 C"],
    lanes: Lanes,
    silu: bool = False,
) -> tuple[Float[Tensor, "L T C"], Float[Tensor, "L K1 C"]]:
    """y_t = sum_j w_j x_(t - K + 1 + j), K - 1 earlier inputs in `past`, then SiLU where asked; and the inputs at the
    lane's end.

    The last tap is on the token itself, as in torch's Conv1d with padding on the left. Nothing crosses from one
    document of a lane to the next. Where a lane has segments, nothing was before it. In inference on a CPU it is one
    pass of a compiled kernel, with sums in float32.
    """
    taps, past = weight.shape[1], past.to(x.dtype)
    native = serving(x) if lanes.segment is None else None
    found = None if native is None else native.scans.conv(x, weight, bias, past, lanes.filled, silu)
    if found is not None:
        return found
    whole = torch.cat([past, x], 1)
    y = _ShortConv.apply(whole, weight, bias, near(lanes, taps, x.dtype))
    return F.silu(y) if silu else y, lanes.tails(whole, taps - 1)


def near(lanes: Lanes, taps: int, dtype: torch.dtype) -> Float[Tensor, "K1 L T 1"] | None:
    """Whether the token 1, 2, ... K - 1 places before is of the same document: 1 or 0; None: always."""
    if lanes.segment is None:
        return None
    now, found = lanes.segment, []
    for back in range(1, taps):
        same = now[:, back:] == now[:, : max(0, lanes.length - back)]
        found.append(F.pad(same, (min(back, lanes.length), 0)))
    return torch.stack(found)[..., None].to(dtype)


class _ShortConv(torch.autograd.Function):
    """Elementwise products: for a handful of taps they cost less than a convolution's rearrangement. The gradient by
    hand, since torch's own has for each tap zeros as large as the input."""

    @staticmethod
    def forward(
        ctx: Any,
        whole: Float[Tensor, "L S C"],
        weight: Float[Tensor, "C K"],
        bias: Float[Tensor, "C"] | None,
        near: Float[Tensor, "K1 L T 1"] | None,
    ) -> Float[Tensor, "L T C"]:
        ctx.save_for_backward(whole, weight, near)
        ctx.biased = bias is not None
        taps, length = weight.shape[1], whole.shape[1] - weight.shape[1] + 1
        out = whole[:, taps - 1 :] * weight[:, -1]
        for back in range(1, taps):
            first = taps - 1 - back
            term = whole[:, first : first + length]
            out.addcmul_(term if near is None else term * near[back - 1], weight[:, first])
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        whole, weight, near = ctx.saved_tensors
        taps, length, grad = weight.shape[1], grads[0].shape[1], grads[0]
        by_input, by_weight = torch.zeros_like(whole), []
        for first in range(taps):
            back = taps - 1 - first
            reached = grad if near is None or back == 0 else grad * near[back - 1]
            by_input[:, first : first + length].addcmul_(reached, weight[:, first])
            by_weight.append((reached * whole[:, first : first + length]).sum((0, 1)))
        return by_input, torch.stack(by_weight, 1), grad.sum((0, 1)) if ctx.biased else None, None
