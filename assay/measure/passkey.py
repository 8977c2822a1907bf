"""Passkey retrieval by length and by distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay.data.tasks.passkey import Example, Passkey, accuracy
from assay.measure.subject import Subject
from assay.ops.step import rows_step

SECONDS = 1.5
KEYS = 1 << 40  # examples are numbered from here
ROWS = 32


def measure(
    subject: Subject, *, lengths: Sequence[int] | None = None, distances: Sequence[int] | int = 4, samples: int = 32
) -> list[dict[str, Any]]:
    """Rows: length, distance, accuracy, chance, samples.

    The task is the recipe's (`recipe.mix.passkey`). lengths: tokens of a document, null is half the training length and
    the training length. distances: tokens back to the key, or how many, evenly spread over those that a length has.
    An answer counts when all its symbols are right, each the most likely one after those before it. A length that the
    model does not reach gives rows without an accuracy and with a `reason`.
    """
    if not subject.tokenizer.is_bytes:
        raise ValueError("passkey: its documents are bytes; recipe.tokenizer.kind must be byte")
    if samples < 1:
        raise ValueError(f"passkey: samples: {samples}; accepted: 1 or more")
    task = subject.recipe.mix.passkey
    rows = []
    for length in lengths if lengths is not None else (subject.length // 2, subject.length):
        for distance in spread(task.distances(length), distances):
            row = {"length": length, "distance": distance, "accuracy": None, "chance": task.chance, "samples": samples}
            reason = subject.refusal(length)
            rows.append(
                row | ({"reason": reason} if reason else {"accuracy": score(subject, length, distance, samples)})
            )
    return rows


def spread(possible: range, distances: Sequence[int] | int) -> list[int]:
    """The asked distances that are possible, or that many of them from the nearest to the farthest."""
    if not isinstance(distances, int):
        return [d for d in distances if d in possible]
    places = np.linspace(possible[0], possible[-1], max(1, distances))
    return sorted({round(place) for place in places.tolist()})


def score(subject: Subject, length: int, distance: int, samples: int) -> float:
    """The share of `samples` questions of one length and distance that are answered in full."""
    task: Passkey = subject.recipe.mix.passkey
    examples = [task.example(length, KEYS + i, distance) for i in range(samples)]
    groups = [examples[i : i + ROWS] for i in range(0, samples, ROWS)]
    answers = [answer for group in groups for answer in answered(subject, group).tolist()]
    return accuracy(examples, answers)


@torch.no_grad()
def answered(subject: Subject, examples: Sequence[Example]) -> Tensor:
    """[R, digits]: the most likely symbol after the prompt and the right symbols before it.

    It is right in every place exactly when greedy decoding is, so that one pass answers the whole question.
    """
    ids = torch.from_numpy(np.stack([np.concatenate([e.prompt, e.answer[:-1]]) for e in examples]))
    rows, width = ids.shape
    digits = len(examples[0].answer)
    ends = torch.arange(rows)[:, None] * width + torch.arange(width - digits, width)
    place = subject.device
    step = rows_step(ids.to(place), horizon=width + 1, emit=ends.view(-1).to(place))
    logits = subject.model.eval()(step).logits
    assert logits is not None
    return logits.argmax(-1).view(rows, digits).cpu()
