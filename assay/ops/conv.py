"""Short causal convolutions, one filter a channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from assay.ops.lanes import Lanes


def short_conv(
    x: Float[Tensor, "L T C"],
    weight: Float[Tensor, "C K"],
    bias: Float[Tensor, "C"] | None,
    past: Float[Tensor, "L K1 C"],
    lanes: Lanes,
) -> tuple[Float[Tensor, "L T C"], Float[Tensor, "L K1 C"]]:
    """y_t = sum_j w_j x_(t - K + 1 + j), K - 1 earlier inputs in `past`; and those at the lane's end.

    The last tap is on the token itself, as in torch's Conv1d with padding on the left. Nothing crosses from one
    document of a lane to the next. Elementwise products: for a handful of taps they cost less than a convolution's
    rearrangement. Where a lane has segments, nothing was before it.
    """
    taps, length = weight.shape[1], x.shape[1]
    whole = torch.cat([past.to(x.dtype), x], 1)
    out = whole[:, taps - 1 :] * weight[:, -1]
    for back in range(1, taps):
        first = taps - 1 - back
        term = whole[:, first : first + length] * weight[:, taps - 1 - back]
        if lanes.segment is not None:
            here, before = lanes.segment[:, back:], lanes.segment[:, : max(0, length - back)]
            own = F.pad(here == before, (min(back, length), 0))
            term = torch.where(own[..., None], term, 0.0)
        out = out + term
    return (out if bias is None else out + bias), lanes.tails(whole, taps - 1)
