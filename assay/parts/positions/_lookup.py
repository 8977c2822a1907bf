"""Tables of positions, and the refusal of a position past their end."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.step import Step


def lookup(table: Float[Tensor, "L D"], positions: Int[Tensor, "N"], step: Step, kind: str) -> Float[Tensor, "N D"]:
    """Rows of the table. A position past its end raises ValueError; it never wraps.

    `step.reach` tells without asking the device. Where its maker did not say, torch's own bounds check does.
    """
    rows = table.shape[0]
    if step.reach is not None and step.reach > rows:
        raise ValueError(
            f"{kind} positions: position {step.reach - 1} is past the table, which has {rows} (0 to {rows - 1})"
        )
    try:
        return F.embedding(positions, table)
    except IndexError:
        raise ValueError(
            f"{kind} positions: a position is past the table, which has {rows} (0 to {rows - 1})"
        ) from None


def refuse_context(kind: str, context: int, limit: int, field: str) -> None:
    if context > limit:
        raise ValueError(f"{kind} positions end at {limit} (`{field}`), but the model's `context` is {context}")
