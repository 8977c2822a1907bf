"""The rows of a diagnostic task, as what a run trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers as hf
import torch
from tokenizers import models, pre_tokenizers

from assay.data.loader import Batch, Source
from assay.data.tasks.base import Examples, Task
from assay.data.tokenizers import Tokenizer
from assay.spec.load import digest

HELD_OUT = -1
"""The seed of the rows that are never trained on: recipes have seeds from 0 on."""


@dataclass(frozen=True)
class TaskRows:
    """`assay.data.dataset.Data` of a task: rows without end, and as many others to validate on."""

    task: Task
    validates: bool = True

    @property
    def digest(self) -> str:
        return digest(self.task)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """A symbol is its number, and spaces stand between."""
        made = hf.Tokenizer(models.WordLevel({str(i): i for i in range(self.task.vocab)}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return Tokenizer(made)

    def stream(self, rows: int, length: int, seed: int, mix: Sequence[tuple[Source, float]] = ()) -> TaskStream:
        assert not mix and length == self.task.length
        return TaskStream(self.task, rows, seed)

    def held_out(self, length: int, count: int) -> Batch:
        assert length == self.task.length
        return batch_of(self.task.draw(count, HELD_OUT))


class TaskStream:
    """Batches of `rows` rows of a task, in the order of their numbers."""

    def __init__(self, task: Task, rows: int, seed: int) -> None:
        self.task, self.rows, self.seed = task, rows, seed
        self._drawn = 0

    def __next__(self) -> Batch:
        examples = self.task.draw(self.rows, self.seed, self._drawn)
        self._drawn += self.rows
        return batch_of(examples)

    def state(self) -> dict[str, Any]:
        return {"task": digest(self.task), "seed": self.seed, "drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        if (state.get("task"), state.get("seed")) != (digest(self.task), self.seed):
            raise ValueError("data state: taken with another task, or another seed, than these")
        self._drawn = int(state["drawn"])


def batch_of(examples: Examples) -> Batch:
    """Each row a sequence of its own, with the prefix that the task says; an answer counts as one byte."""
    rows, length = examples.inputs.shape
    targets = torch.from_numpy(np.ascontiguousarray(examples.targets, np.int64)).flatten()
    return Batch(
        inputs=torch.from_numpy(np.ascontiguousarray(examples.inputs, np.int64)).flatten(),
        targets=targets,
        seq=torch.arange(rows).repeat_interleave(length),
        index=torch.arange(length).repeat(rows),
        starts=torch.arange(rows + 1) * length,
        target_bytes=(targets >= 0).long(),
        grid=(rows, length),
        prefix=None if examples.prefix is None else torch.from_numpy(examples.prefix).repeat_interleave(length),
    )
