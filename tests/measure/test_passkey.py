"""Passkey scores of models whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assay.data.tasks.passkey import Passkey
from assay.measure import passkey
from assay.measure.subject import Subject
from assay.ops.step import Step
from tests.measure.subjects import recipe, spec, subject

TASK = {"digits": 2, "statement": "#", "end": ";"}


class Oracle(torch.nn.Module):
    """Says what followed the first `#` of its row; past `reach` tokens back it has forgotten and says 0."""

    def __init__(self, task: Passkey, reach: int) -> None:
        super().__init__()
        self.task, self.reach = task, reach
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, step: Step) -> Any:
        rows, width = step.grid or (1, step.tokens)
        ids = step.ids.view(rows, width)
        logits = torch.zeros(rows * self.task.digits, 256)
        for r, row in enumerate(ids):
            prompt = row[: width - self.task.digits + 1]
            key = self.task.solve(prompt.numpy())
            told = bytes(row.tolist()).index(b"#") + 1
            near = width + 1 - self.task.digits - told <= self.reach
            for i, symbol in enumerate(key.tolist()):
                logits[r * self.task.digits + i, symbol if near else ord("0")] = 1.0
        assert step.emit is not None and step.emit.view(rows, -1)[0].tolist() == list(
            range(width - self.task.digits, width)
        )
        return SimpleNamespace(logits=logits)


def made(reach: int) -> Subject:
    how = recipe(32, mix={"share": 0.5, "passkey": TASK})
    base = subject(how=how)
    return replace(base, model=Oracle(how.mix.passkey, reach))  # type: ignore[arg-type]


def test_an_oracle_is_right_as_far_as_it_reaches() -> None:
    rows = passkey.measure(made(20), lengths=[32, 40], distances=[10, 20, 21, 36], samples=5)
    assert [(r["length"], r["distance"]) for r in rows] == [
        *((32, d) for d in (10, 20, 21)),
        *((40, d) for d in (10, 20, 21, 36)),
    ]
    assert [r["accuracy"] for r in rows] == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert {r["chance"] for r in rows} == {0.01} and {r["samples"] for r in rows} == {5}


def test_a_random_model_is_at_chance_and_a_table_that_ends_refuses() -> None:
    how = recipe(16, mix={"share": 0.5, "passkey": {"digits": 1, "statement": "#", "end": ";", "alphabet": "01"}})
    rows = passkey.measure(subject(spec({"kind": "learned"}), how), lengths=[16, 32], distances=2, samples=4)
    assert all(0 <= r["accuracy"] <= 1 for r in rows if r["length"] == 16)
    assert all(r["accuracy"] is None and "end at 16" in r["reason"] for r in rows if r["length"] == 32)
    assert [r["distance"] for r in rows if r["length"] == 16] == [3, 14]


def test_answers_are_greedy_decoding() -> None:
    """The teacher-forced answer is right exactly when the model's own is."""
    from assay.engine.engine import generate
    from assay.engine.request import Request, SamplingParams

    how = recipe(16, mix={"share": 0.5, "passkey": {"digits": 2, "statement": "#", "end": ";"}})
    seen = subject(how=how, dtype=torch.float32)
    examples = [how.mix.passkey.example(16, key, 8) for key in range(20)]
    ask = [
        Request(prompt=tuple(e.prompt.tolist()), max_new=2, sampling=SamplingParams(temperature=0)) for e in examples
    ]
    said: list[list[int]] = [[] for _ in ask]
    for token in generate(seen.model, seen.tokenizer, ask):
        said[token.request].append(token.id)
    # The examples' keys become what the model says for some: its first symbol is right, then its second.
    truth = [replace(e, answer=e.answer.copy()) for e in examples]
    for e, own in zip(truth[::2], said[::2], strict=True):
        e.answer[:] = own
    told = passkey.answered(seen, truth).tolist()
    right = [given == e.answer.tolist() for given, e in zip(told, truth, strict=True)]
    assert right == [own == e.answer.tolist() for own, e in zip(said, truth, strict=True)] and sum(right) == 10


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="samples: 0"):
        passkey.measure(made(9), samples=0)
    with pytest.raises(ValueError, match="needs 7 tokens"):
        passkey.measure(made(9), lengths=[4])
