"""The recipe's diagnostic task, at its own length and on longer rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.measure.probe import accuracy, message, rows_of, task_of
from assay.measure.subject import Subject

SECONDS = 1.0


def measure(subject: Subject, *, factors: Sequence[int] = (1, 2, 4)) -> list[dict[str, Any]]:
    """Rows: factor, length, accuracy, floor. factors: rows so many times as long as those that were trained on.

    The accuracy is that of the most likely symbol, on rows that nobody trained on. A length that the task or the model
    does not reach gives a row without an accuracy and with a `reason`.
    """
    task = task_of(subject.recipe)
    rows = []
    for factor in factors:
        row: dict[str, Any] = {"factor": factor, "length": task.length * factor, "accuracy": None}
        try:
            longer = task if factor == 1 else task.longer(factor)
        except ValueError as error:
            rows.append(row | {"reason": message(error)})
            continue
        row |= {"length": longer.length, "floor": longer.floor}
        reason = subject.refusal(longer.length)
        rows.append(
            row | ({"reason": reason} if reason else {"accuracy": accuracy(subject.model, longer, rows_of(longer))})
        )
    return rows
