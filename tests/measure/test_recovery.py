"""Recovery by fine-tuning against plain torch, and against `extrapolation` where nothing is tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from assay.data.loader import Loader
from assay.data.tasks.passkey import Passkey
from assay.measure import extrapolation
from assay.measure.recovery import measure
from assay.measure.subject import Subject
from assay.model.lm import LM
from assay.ops.step import training_step
from assay.spec.load import change
from tests.measure.subjects import recipe, spec, subject

SCALING = "model.positions.main.scaling"
VARIANTS: dict[str, dict[str, Any]] = {
    "pi": {SCALING: {"kind": "linear", "factor": 4.0}},
    "yarn": {SCALING: {"kind": "yarn", "factor": 4.0, "original": 16}},
}
PASSKEY = {"digits": 1, "statement": "#", "end": ";", "asks": 8, "answer_only": True}
# 100 steps of 8 x 16 tokens; a fifth of them on rows of 4 x 16 tokens is 20 steps of 2 x 64 tokens.
TRAINED = recipe(
    tokens=12_800,
    batch={"rows": 8, "length": 16, "accumulate": 4},
    mix={"share": 0.5, "passkey": PASSKEY},
    optimizer={"lr": 0.02, "lr_width": 32, "weight_decay": 0.0},
    seed=3,
)


def made(**more: Any) -> Subject:
    return subject(how=TRAINED.model_copy(update=more), dtype=torch.float32)


def by_hand(start: Subject, changes: dict[str, Any], rate: float) -> Subject:
    """Twenty steps of torch's AdamW on the mean loss of the logits. The peak for width 16 is 0.02 * 32 / 16; two steps
    warm up."""
    model = LM(change(start.spec, {**changes, "model.context": 64}))
    model.load_state_dict(start.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    assert start.dataset is not None
    loader = Loader(start.dataset.train, 2, 64, 3, [(Passkey(**PASSKEY), 0.5)])
    for number in range(20):
        batch = next(loader)
        logits = model(training_step(batch.inputs, batch.seq, batch.index, (2, 64), 64)).logits
        F.cross_entropy(logits, batch.targets, ignore_index=-1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * 0.04 * min(1.0, (number + 1) / 2)
        optimizer.step()
        optimizer.zero_grad()
    return replace(start, model=model, spec=model.spec)


def test_tuned_rows_are_those_of_a_loop_by_hand() -> None:
    start = made()
    rows = measure(start, variants=VARIANTS, share=0.2, rate=0.5, windows=4)
    for name, changes in {"none": {}, **VARIANTS}.items():
        before, after = ([r for r in rows if (r["variant"], r["tuned"]) == (name, tuned)] for tuned in (False, True))
        assert [r["tokens_tuned"] for r in before + after] == [0] * 3 + [20 * 128] * 3
        assert [(r["ratio"], r["length"]) for r in after] == [(1.0, 16), (2.0, 32), (4.0, 64)]
        expected = extrapolation.measure(by_hand(start, changes, 0.5), ratios=(1, 2, 4), windows=4)
        for row, wanted, untuned in zip(after, expected, before, strict=True):
            assert row["loss_nats"] == pytest.approx(wanted["loss_nats"], abs=1e-4)
            assert row["last_nats"] == pytest.approx(wanted["last_nats"], abs=1e-4)
            assert row["loss_nats"] < untuned["loss_nats"] - 0.1


def test_without_a_share_every_row_is_extrapolations_own() -> None:
    start = subject()
    ratios, windows = (1, 1.5, 4), 3
    rows = measure(start, ratios=ratios, variants=VARIANTS, share=0, windows=windows)
    expected = extrapolation.measure(start, ratios=ratios, variants=VARIANTS, windows=windows)
    for tuned in (False, True):
        found = [r for r in rows if r["tuned"] is tuned]
        assert [r["variant"] for r in found] == [n for n in ("none", *VARIANTS) for _ in ratios]
        assert [{k: r[k] for k in expected[0] if k != "variant"} for r in found] == [
            {k: v for k, v in r.items() if k != "variant"} for r in expected
        ]
    assert {r["tokens_tuned"] for r in rows} == {0}


def test_the_subject_and_the_random_state_stay_as_they_are() -> None:
    start = made()
    held = {name: p.clone() for name, p in start.model.state_dict().items()}
    described = start.spec
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    measure(start, variants=VARIANTS, share=0.05, windows=2)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(p, held[name]) for name, p in start.model.state_dict().items())
    assert start.spec == start.model.spec == described and not start.model.training
    assert all(p.grad is None and p.requires_grad for p in start.model.parameters())


def test_rows_that_do_not_divide_the_batch_leave_a_step_smaller() -> None:
    """128 tokens a step hold two rows of 48; a twentieth of 12 800 tokens is seven such steps."""
    rows = measure(made(), factor=3, windows=2)
    assert rows[-1]["tokens_tuned"] == 7 * 96


@pytest.mark.parametrize(("end", "message"), [(None, "end at 16"), (24, "end at 24")])
def test_a_table_that_ends_before_the_longer_rows_is_not_tuned(end: int | None, message: str) -> None:
    position = {"kind": "learned"} | ({"max": end} if end is not None else {})
    rows = measure(subject(spec(position)), ratios=(1, 2), windows=2)
    assert [(r["tuned"], r["loss_nats"] is None) for r in rows] == [
        (False, False),
        (False, True),
        (True, True),
        (True, True),
    ]
    assert all(message in r["reason"] for r in rows[1:]) and rows[3]["tokens_tuned"] == 0


def test_a_table_that_is_long_enough_is_tuned() -> None:
    rows = measure(subject(spec({"kind": "learned", "max": 64}), TRAINED), ratios=(4,), share=0.2, windows=2)
    assert rows[1]["loss_nats"] < rows[0]["loss_nats"] and rows[1]["tokens_tuned"] == 2560


def test_what_a_model_does_not_have_and_what_diverges_are_rows_with_a_reason() -> None:
    alibi = subject(spec({"kind": "alibi", "heads": 2}), TRAINED)
    wider = {"wide": {"model.d_model": 32}}
    rows = measure(alibi, ratios=(1,), variants={"pi": VARIANTS["pi"], **wider}, windows=2)
    by_name = {(r["variant"], r["tuned"]): r for r in rows}
    assert by_name["none", True]["loss_nats"] is not None
    for tuned in (False, True):
        assert by_name["pi", tuned]["loss_nats"] is None and "scaling" in by_name["pi", tuned]["reason"]
        assert "keep every weight" in by_name["wide", tuned]["reason"]
    lost = measure(subject(spec().model_copy(update={"final_norm": None}), TRAINED), rate=1e30, ratios=(1,), windows=2)
    assert lost[0]["loss_nats"] is not None and lost[1]["loss_nats"] is None
    assert lost[1]["reason"].startswith("not tuned: step ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": {"none": {}}}, "'none' is the model as it was trained"),
        ({"variants": {"base": {}}}, "'base' is the model as it was trained"),
        ({"factor": 0.5}, "factor: 0.5; accepted: 1 or more"),
        ({"share": -0.1}, "share: -0.1; accepted: 0 to 1"),
        ({"share": 1.5}, "share: 1.5; accepted: 0 to 1"),
        ({"rate": 0.0}, "rate: 0.0; accepted: above 0"),
        ({"ratios": (0,)}, "accepted: above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(subject(), **options)
