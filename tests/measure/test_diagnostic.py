"""The recipe's task at several lengths, and tasks that a spec is trained on anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from assay.data.tasks.parity import Parity
from assay.measure import diagnostic, task
from assay.measure.probe import probe
from assay.measure.subject import Subject
from assay.model.lm import LM, build
from assay.spec.load import dump, load_model
from assay.train.recipe import change_recipe, load_recipe

SHORT = {"data": dump(Parity(length=8)), "batch.length": 8, "batch.rows": 4, "tokens": 32, "evaluation.tokens": 32}


class Knows(LM):
    """Answers parity right, in rows of up to `reach` bits, and always 0 beyond."""

    reach = 16

    def forward(self, step, *args, **more):  # type: ignore[no-untyped-def]
        out = super().forward(step, *args, **more)
        rows = step.ids.view(step.grid)
        right = rows.cumsum(1) % 2 * (torch.arange(rows.shape[1]) < self.reach)
        return replace(out, logits=torch.nn.functional.one_hot(right.flatten(), 2).float())


def subject(model: LM) -> Subject:
    return Subject(model, model.spec, change_recipe(load_recipe("probe"), SHORT), None)  # type: ignore[arg-type]


def test_each_length_is_asked_with_its_own_rows() -> None:
    spec = load_model("probe-attention", {"model.vocab": 2, "model.context": 8, "model.layers": 1})
    model = Knows(spec)
    model.load_state_dict(build(spec).state_dict())
    rows = task.measure(subject(model), factors=[1, 2, 4])
    assert [(r["factor"], r["length"], r["floor"]) for r in rows] == [(1, 8, 0.5), (2, 16, 0.5), (4, 32, 0.5)]
    assert [r["accuracy"] for r in rows[:2]] == [1.0, 1.0]
    assert rows[2]["accuracy"] == pytest.approx(0.75, abs=0.02)  # half of it known, half of it guessed


def test_a_model_that_ends_before_says_so() -> None:
    spec = load_model("probe-attention", {"model.vocab": 2, "model.context": 8, "model.positions": {"main": "learned"}})
    found = task.measure(subject(build(spec)), factors=[1, 2])
    assert found[0]["accuracy"] is not None
    assert found[1]["accuracy"] is None and "end at 8" in found[1]["reason"]


def test_a_diagnostic_is_a_probe_of_the_same_spec() -> None:
    """The rows are what the verb's own road gives for the spec over the task's symbols, seed and rate the subject's."""
    spec = load_model("probe-attention", {"model.layers": 1})
    held = replace(subject(build(spec)), recipe=change_recipe(load_recipe("smoke"), {"seed": 3, "optimizer.lr": 2e-3}))
    [row] = diagnostic.measure(held, tasks=["parity"], steps=5, rows=4)
    size = Parity()
    own = load_model("probe-attention", {"model.layers": 1, "model.vocab": 2, "model.context": size.length})
    how = {"data": dump(size), "batch.length": size.length, "batch.rows": 4, "tokens": 20 * size.length}
    recipe = change_recipe(load_recipe("probe"), how | {"seed": 3, "optimizer.lr": 2e-3})
    assert row == {"task": "parity", "accuracy": probe(own, recipe).accuracy, "floor": 0.5, "steps": 5}


def test_a_diagnostic_has_a_rate_of_its_own() -> None:
    held = subject(build(load_model("probe-attention", {"model.layers": 1})))
    own = replace(held, recipe=change_recipe(held.recipe, {"optimizer.lr": 3e-2}))
    mine, theirs = (
        diagnostic.measure(s, tasks=["parity"], steps=30, rows=4, lr=lr) for s, lr in ((held, 3e-2), (own, None))
    )
    assert mine == theirs != diagnostic.measure(held, tasks=["parity"], steps=30, rows=4)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'parityy'"):
        diagnostic.measure(subject(build(load_model("probe-attention"))), tasks=["parityy"])
