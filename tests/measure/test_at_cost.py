"""The curve read at a cost, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from assay.measure.at_cost import between, measure
from assay.measure.subject import Subject
from assay.train.loop import train
from tests.train.small import model, recipe


def test_between_points() -> None:
    curve = [(100, 4.0), (200, 3.0), (400, 2.5)]
    found = [between(curve, at) for at in (99, 100, 150, 200, 300, 400, 401)]
    assert found == [None, 4.0, 3.5, 3.0, 2.75, 2.5, None]


def test_costs_of_a_run() -> None:
    made = train(model(), recipe(evaluation__points=4))
    subject = Subject.of(replace(made, train_s=8.0))
    per_token = made.train_flops / made.tokens
    rows = measure(subject, times=(4.0, 8.0, 9.0), flops=(256 * per_token,))
    half = dict(made.valid_losses)[256]
    assert rows[0]["loss_nats"] == rows[3]["loss_nats"] == pytest.approx(half) and rows[0]["times"] == 4.0
    assert rows[1]["bits_per_byte"] == pytest.approx(made.evaluation.bits_per_byte)  # type: ignore[union-attr]
    assert rows[2]["loss_nats"] is None and rows[2]["bits_per_byte"] is None
    with pytest.raises(ValueError, match="no validation curve"):
        measure(replace(subject, outcome=None))
