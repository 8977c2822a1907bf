"""How good a model was after so many seconds, or FLOPs, of training: where tokens cost differently, and say more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from assay.measure.subject import Subject

SECONDS = 0.0


def measure(subject: Subject, *, times: Sequence[float] = (), flops: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Rows: `times` (seconds of training at the run's mean rate) or `flops` as asked for, tokens, loss_nats,
    bits_per_byte: of the validations, and between two of them on the line that joins them; null where the run was
    shorter, or not yet validated. Where the schedule decays, an earlier point is not the end of a shorter run.

    ValueError for a model that was not trained here, or without validation.
    """
    found = subject.outcome
    if found is None or found.evaluation is None:
        raise ValueError("at_cost: no validation curve: the model was not trained and validated in this run")
    ratio = found.evaluation.bits_per_byte / found.evaluation.loss_nats
    per_token = found.train_flops / found.tokens
    wanted = [("times", t, t * found.train_tok_s) for t in times] + [("flops", f, f / per_token) for f in flops]
    rows = []
    for name, cost, tokens in wanted:
        nats = between(found.valid_losses, tokens)
        bits = None if nats is None else nats * ratio
        rows.append({name: float(cost), "tokens": tokens, "loss_nats": nats, "bits_per_byte": bits})
    return rows


def between(curve: Sequence[tuple[int, float]], at: float) -> float | None:
    """The curve at a place, by lines between its points; None before its first and behind its last one."""
    for (left, low), (right, high) in pairwise(curve):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return None
