"""The recipe's diagnostic task, at its own length and on longer rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.measure.probe import FACTORS, at_lengths, task_of
from assay.measure.subject import Subject

SECONDS = 1.0


def measure(subject: Subject, *, factors: Sequence[int] = FACTORS) -> list[dict[str, Any]]:
    """Rows: factor, length, accuracy, floor. factors: rows so many times as long as those that were trained on.

    The accuracy is that of the most likely symbol, on rows that nobody trained on. A length that the task or the model
    does not reach gives a row without an accuracy and with a `reason`.
    """
    return at_lengths(subject, task_of(subject.recipe), factors)
