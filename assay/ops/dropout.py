"""Dropout whose draws do not depend on how a batch's rows are spread over processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops.step import Step


def dropout(x: Tensor, share: float, training: bool, step: Step) -> Tensor:
    """x [N, ...] without `share` of its values, the others growing by 1 / (1 - share); x itself outside training.

    A process that holds a part of a batch draws for the whole of it and takes its own rows.
    """
    if step.part is None or not training or not share:
        return F.dropout(x, share, training)
    length = x.shape[0] // step.part.own
    whole = x.new_ones(step.part.rows * length, *x.shape[1:])
    return x * step.part.cut(F.dropout(whole, share, True), length)


def keeps(shape: tuple[int, ...], share: float, device: torch.device, step: Step) -> Tensor:
    """Booleans of shape [R, ...], a row of them for a row of the batch: False with probability `share`."""
    rows = shape[0] if step.part is None else step.part.rows
    drawn = torch.rand(rows, *shape[1:], device=device) >= share
    return drawn if step.part is None else step.part.cut(drawn)
