"""Short causal convolutions, one filter a channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.lanes import Lanes
from assay.ops.native import Kernels, serving, training
from assay.ops.native.elementwise import Elementwise
from assay.ops.native.scans import Act, Ends
from assay.ops.precision import high
from assay.ops.state import Rows

PLAIN = Act()


def short_conv(
    x: Float[Tensor, "L T C"],
    weight: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"] | None,
    past: Float[Tensor, "L K1 C"] | Rows,
    lanes: Lanes,
    act: Act = PLAIN,
) -> tuple[Float[Tensor, "L T C"], Float[Tensor, "L K1 C"]]:
    """y_t = sum_j w_j x_(t - K + 1 + j), K - 1 earlier inputs in `past`; and those at the lane's end.

    The last tap is on the token itself, as in torch's Conv1d with padding on the left. Nothing crosses from one
    document of a lane to the next. Where a lane has segments, nothing was before it. In inference on a CPU it is one
    pass of a compiled kernel, with sums in float32. act: SiLU behind it, and a result of float32 or better.
    """
    (found,), tail = short_convs([x], [weight], [bias], past, lanes, act)
    return found, tail


def short_convs(
    parts: Sequence[Float[Tensor, "L T _"]],
    weights: Sequence[Float[Tensor, "_ K"]],
    biases: Sequence[Tensor | None],
    past: Float[Tensor, "L K1 C"] | Rows,
    lanes: Lanes,
    act: Act = PLAIN,
) -> tuple[list[Float[Tensor, "L T _"]], Float[Tensor, "L K1 C"]]:
    """`short_conv` of inputs whose channels stand side by side in the past and at the end."""
    native = serving(parts[0]) if lanes.segment is None else None
    found = None if native is None else walked(native, parts, weights, biases, lanes.rows(past), lanes, act)
    if found is not None:
        return found
    taps, widths = weights[0].shape[1], [p.shape[-1] for p in parts]
    x, weight = (t[0] if len(t) == 1 else torch.cat(list(t), dim) for t, dim in ((parts, -1), (weights, 0)))
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    whole = torch.cat([(past if isinstance(past, Tensor) else past.read()).to(x.dtype), x], 1)
    beside = near(lanes, taps, x.dtype)
    native = training(whole, weight, *(() if bias is None else (bias,)), half=True)
    if native is None:
        y = _ShortConv.apply(whole, weight, bias, beside)
    else:
        reach = None if beside is None else beside.sum((0, 3)).long()
        y = _Filter.apply(whole, weight, bias, reach, native.elementwise)
    y = F.silu(y) if act.silu else y
    y = high(y) if act.wide else y
    return list(y.split(widths, -1)), lanes.tails(whole, taps - 1)


def walked(
    native: Kernels,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    past: Rows,
    lanes: Lanes,
    act: Act,
) -> tuple[list[Tensor], Tensor] | None:
    """By the compiled kernel, which reads the past where it is stored; None where it does not serve."""
    widths, taps = [p.shape[-1] for p in parts], weights[0].shape[1]
    pools = Rows(past.pool.to(parts[0].dtype), past.index)
    tail, ys, first = parts[0].new_empty(lanes.count, taps - 1, sum(widths)), list[Tensor](), 0
    for x, weight, bias, width in zip(parts, weights, biases, widths, strict=True):
        own = Rows(pools.pool[..., first : first + width], pools.index)
        y = native.scans.conv(x, weight, bias, Ends(own, lanes.filled, tail[..., first : first + width]), act)
        if y is None:
            return None
        ys.append(y)
        first += width
    return ys, tail


def near(lanes: Lanes, taps: int, dtype: torch.dtype) -> Float[Tensor, "K1 L T 1"] | None:
    """Whether the token 1, 2, ... K - 1 places before is of the same document: 1 or 0; None: always."""
    if lanes.segment is None:
        return None
    now, found = lanes.segment, []
    for back in range(1, taps):
        same = now[:, back:] == now[:, : max(0, lanes.length - back)]
        found.append(F.pad(same, (min(back, lanes.length), 0)))
    return torch.stack(found)[..., None].to(dtype)


class _Filter(torch.autograd.Function):
    """By the compiled kernels: a pass over the numbers, and one back. Their numbers are float32, and what is kept is in
    the dtype that came: torch's fused products and sums of bfloat16 go a number at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, reach: Tensor | None, native: Elementwise
    ) -> Tensor:
        ctx.native, ctx.biased = native, bias is not None
        ctx.save_for_backward(x, weight, reach)
        y = native.filter(high(x), high(weight), None if bias is None else high(bias), reach)
        return y.to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        native: Elementwise = ctx.native
        x, weight, reach = ctx.saved_tensors
        found = native.filter_back(high(x), high(weight), reach, high(grads[0]))
        by_x, by_weight, by_bias = (found[0].to(x.dtype), *(t.to(weight.dtype) for t in found[1:]))
        return by_x, by_weight, by_bias if ctx.biased else None, None, None


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
