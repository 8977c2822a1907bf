"""The measurement of attention on a mixer that is none of assay's own, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.measure import attention
from assay.ops import attend as ops
from assay.ops.here import Here
from assay.ops.sees import Sees
from assay.ops.state import State
from assay.ops.step import Step
from assay.parts.base import Mixer
from tests.measure.subjects import spec, subject

LENGTH = 16


class Even(Mixer):
    """Queries of zero: every visible key gets the same share."""

    def prepare_key(self) -> object:
        return "even"

    def prepare(self, step: Step, state: State | None) -> Any:
        assert state is not None
        return ops.plan(step, state.layout(step), Sees())

    def forward(self, x: Tensor, step: Step, here: Here) -> Tensor:
        k = self.k(x, step).unflatten(-1, (2, -1))
        view = here.state.append(step, k=k, v=k)
        mix = ops.attend(torch.zeros_like(k), view, step, Sees(), ops.Scores(1.0), step.table(self), here)
        return self.out(mix.flatten(1), step)


def test_any_mixer_that_publishes_is_measured() -> None:
    made = subject(spec(layers=3))
    second: Any = made.model.blocks[1]
    even = Even(second.mixer.spec, second.mixer.site).double()
    even.load_state_dict(second.mixer.state_dict())
    second.mixer = even
    rows = attention.measure(made, tokens=2 * LENGTH)
    assert [(row["layer"], row["tokens"]) for row in rows] == [(n, 2 * LENGTH) for n in range(3)]
    entropy = sum(math.log(i + 1) for i in range(LENGTH)) / LENGTH
    mass = sum(1 / (i + 1) for i in range(1, LENGTH)) / (LENGTH - 1)
    assert rows[1] == {
        "layer": 1,
        "tokens": 2 * LENGTH,
        "sink_mass": pytest.approx(mass),
        "entropy_nats": pytest.approx(entropy),
        "max_logit": 0.0,
    }
    assert rows[0]["max_logit"] > 0.0 and rows[2]["entropy_nats"] < entropy


def test_dropout_is_off_while_measuring() -> None:
    plain, dropping = (
        attention.measure(subject(spec(scores=rule)), tokens=2 * LENGTH) for rule in ({}, {"dropout": 0.5})
    )
    assert plain == dropping
