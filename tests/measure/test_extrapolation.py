"""Loss by length against one plain pass for every window and every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from assay.data.loader import windows
from assay.measure.extrapolation import measure
from assay.measure.subject import Subject
from assay.model.lm import LM
from assay.ops.step import rows_step
from assay.spec.load import change
from tests.measure.subjects import spec, subject

RATIOS = (1, 1.5, 2, 4)


@torch.no_grad()
def by_hand(model: LM, seen: Subject, length: int, longest: int, count: int) -> tuple[float, float]:
    """Window by window, token by token from the logits: the mean of all losses, and of the last 8."""
    text = windows(seen.text, longest, count, join=True)
    ids, targets = (t.view(text.grid)[:, :length] for t in (text.inputs, text.targets))
    rows = []
    for row, wanted in zip(ids, targets, strict=True):
        logits = model(rows_step(row[None])).logits
        assert logits is not None
        rows.append(F.cross_entropy(logits, wanted, reduction="none"))
    found = torch.stack(rows)
    return float(found.mean()), float(found[:, -8:].mean())


@pytest.mark.parametrize("position", [{"kind": "rope"}, {"kind": "alibi", "heads": 2}, "dynamic"])
def test_rows_are_the_losses_of_windows(position: Any) -> None:
    """One pass serves RoPE and ALiBi; dynamic NTK changes its angles with the length, so every length is a pass."""
    dynamic = {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0, "original": 16}}
    made = subject(spec(dynamic if position == "dynamic" else position))
    rows = measure(made, ratios=RATIOS, windows=5)
    assert [(r["variant"], r["length"], r["ratio"]) for r in rows] == [("base", round(16 * r), r) for r in RATIOS]
    for row in rows:
        whole, last = by_hand(made.model, made, row["length"], 64, 5)
        assert row["loss_nats"] == pytest.approx(whole, abs=1e-5)
        assert row["last_nats"] == pytest.approx(last, abs=1e-5)


def test_a_variant_has_the_same_weights_and_another_scheme() -> None:
    scaling = {"kind": "linear", "factor": 4.0}
    paths = {"model.positions.main.scaling": scaling}
    made = subject()
    rows = measure(made, ratios=(1, 4), variants={"pi": paths}, windows=3)
    model = LM(change(made.spec, paths)).double()
    model.load_state_dict(made.model.state_dict())
    for row in rows[2:]:
        assert row["variant"] == "pi"
        assert row["loss_nats"] == pytest.approx(by_hand(model, made, row["length"], 64, 3)[0], abs=1e-5)
    assert abs(rows[0]["loss_nats"] - rows[2]["loss_nats"]) > 1e-4


def test_a_learned_table_ends_and_says_so() -> None:
    made = subject(spec({"kind": "learned", "max": 24}))
    rows = measure(made, ratios=(1, 1.5, 2), windows=3)
    assert [row["loss_nats"] is None for row in rows] == [False, False, True]
    assert "end at 24" in rows[2]["reason"] and "reason" not in rows[0]
    assert rows[1]["loss_nats"] == pytest.approx(by_hand(made.model, made, 24, 32, 3)[0], abs=1e-5)


def test_a_change_that_a_model_does_not_have_is_a_row_with_a_reason() -> None:
    changes = {"model.positions.main.scaling": {"kind": "linear", "factor": 2.0}}
    wider = {"model.d_model": 32}
    rows = measure(
        subject(spec({"kind": "alibi", "heads": 2})), ratios=(1,), variants={"pi": changes, "wide": wider}, windows=2
    )
    assert [row["loss_nats"] is None for row in rows] == [False, True, True]
    assert "scaling" in rows[1]["reason"] and "keep every weight" in rows[2]["reason"]


def test_a_text_that_is_too_short_is_said() -> None:
    made = subject()
    tokens = len(made.text.tokens)
    rows = measure(made, ratios=(1, tokens), windows=2)
    assert rows[0]["loss_nats"] is not None
    assert rows[1]["loss_nats"] is None and f"no window of {16 * tokens} tokens" in rows[1]["reason"]
    with pytest.raises(ValueError, match="accepted: above 0"):
        measure(made, ratios=(0,))
