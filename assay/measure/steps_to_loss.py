"""How many steps and tokens of training a loss takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.measure.subject import Subject

SECONDS = 0.0
DEFAULT = (3.5, 3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5)


def measure(subject: Subject, *, losses: Sequence[float] = DEFAULT, over: int = 16) -> list[dict[str, Any]]:
    """Rows: loss_nats, steps, tokens: where the mean training loss of `over` steps is first at or below each of
    `losses`; null where that never happens. ValueError for a model that was not trained here."""
    if subject.outcome is None:
        raise ValueError("steps_to_loss: no training curve: the model was not trained in this run")
    if over < 1:
        raise ValueError(f"steps_to_loss: over: {over}; accepted: 1 or more steps")
    curve = smoothed(subject.outcome.losses, over)
    rows = []
    for loss in losses:
        tokens = next((at for at, nats in curve if nats <= loss), None)
        steps = None if tokens is None else tokens // subject.recipe.batch.tokens
        rows.append({"loss_nats": float(loss), "steps": steps, "tokens": tokens})
    return rows


def smoothed(curve: Sequence[tuple[int, float]], over: int) -> list[tuple[int, float]]:
    """(tokens, mean loss of the last `over` points), from the first whole run of points on."""
    return [
        (curve[i][0], sum(nats for _, nats in curve[i - over + 1 : i + 1]) / over) for i in range(over - 1, len(curve))
    ]
