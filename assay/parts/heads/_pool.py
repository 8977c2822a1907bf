"""One vector for each sequence."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.step import Step

Pool = Literal["first", "last", "mean"]


def pool(h: Float[Tensor, "N D"], step: Step, how: Pool) -> Float[Tensor, "B D"]:
    """The first or last token of each sequence of the step, or the mean of its tokens; padding is left out.

    Sequences are numbered from 0 and begin at `step.starts`: rows of one sequence each, or sequences end to end.
    ValueError where `step.emit` has left tokens out.
    """
    if h.shape[0] != step.tokens:
        raise ValueError(f"pooling needs the features of all {step.tokens} tokens, and `emit` left {h.shape[0]}")
    starts, count = step.starts[:-1], step.past.shape[0]
    if how == "first":
        return h.index_select(0, starts)
    seq = torch.where(step.seq < 0, count, step.seq)
    tokens = torch.zeros(count + 1, dtype=torch.long, device=h.device).index_add(0, seq, torch.ones_like(seq))[:count]
    if how == "last":
        return h.index_select(0, starts + tokens - 1)
    return h.new_zeros(count + 1, h.shape[1]).index_add(0, seq, h)[:count] / tokens[:, None].to(h.dtype)
