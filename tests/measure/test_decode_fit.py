"""The model of decode time: known numbers are recovered, scipy and numpy agree, and the steps are those of decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit

from assay.measure import decode_fit, serving
from assay.measure.decode_fit import Step, fit
from assay.model.lm import build
from assay.ops.step import rows_step
from assay.spec.load import change
from tests.measure.subjects import spec, subject

CELLS = [(batch, batch * context * 1024) for batch in (1, 8, 32) for context in (128, 512, 2048)]
TRUE = (1.5e-3, 4e-5, 1 / 3e9)


def synthetic(noise: float) -> tuple[list[int], list[int], list[float]]:
    draws = np.random.default_rng(0).normal(size=len(CELLS))
    times = [(TRUE[0] + TRUE[1] * b + TRUE[2] * s) * (1 + noise * e) for (b, s), e in zip(CELLS, draws, strict=True)]
    return [b for b, _ in CELLS], [s for _, s in CELLS], times


def test_known_numbers_are_recovered() -> None:
    batches, kept, times = synthetic(0.0)
    found = fit(batches, kept, times)
    assert (found.fixed, found.sequence, found.byte) == pytest.approx(TRUE, rel=1e-9)
    assert found.fitted == pytest.approx(times, rel=1e-9) and found.r2 == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_against_scipy_and_the_weighted_correlation(noise: float) -> None:
    batches, kept, times = synthetic(noise)
    found = fit(batches, kept, times)
    points = np.array([batches, np.array(kept) / 1e6], float)
    theirs, _ = curve_fit(lambda x, a, b, c: a + b * x[0] + c * x[1], points, times, sigma=times, p0=(1e-3, 1e-5, 1e-4))
    assert (found.fixed, found.sequence, 1e6 * found.byte) == pytest.approx(tuple(theirs), rel=1e-4)
    (own, both), (_, other) = np.cov(times, found.fitted, aweights=np.array(times) ** -2)
    assert found.r2 == pytest.approx(both**2 / (own * other), rel=1e-9) and found.r2 < 0.999


def test_cells_that_leave_a_number_open_are_refused() -> None:
    recurrent = ([1, 1, 8, 8, 32, 32], [64, 64, 512, 512, 2048, 2048], [1.0, 1.1, 2.0, 2.1, 5.0, 5.1])
    for batches, kept, times in (([1, 8, 32], [1, 9, 99], [1.0, 2.0, 3.0]), recurrent, ([], [], [])):
        with pytest.raises(ValueError, match="accepted: four or more, with two batches and two contexts"):
            fit(batches, kept, times)


LINEAR = {"kind": "linear", "heads": 2}


@pytest.mark.parametrize("mixer", [{"b.mixer.kv_heads": 1}, {"b.mixer.sees": {"window": 5}}, {"b.mixer": LINEAR}])
def test_a_step_is_the_models_own_and_every_repetition_is_the_same(mixer: dict[str, Any]) -> None:
    """The logits that are timed are those of one pass over the whole sequence, without a cache."""
    made = subject(change(spec(), {f"blocks.{path}": value for path, value in mixer.items()}))
    step, seen = Step(made.model, 3, 12), []
    step.serving.choose = lambda logits: seen.append(logits.clone()) or []  # type: ignore[method-assign, func-returns-value]
    assert len(step.burst()) == 4 and len(seen) == 5
    ids = step.serving.ids[:1].repeat(3, 1)
    ids[:, -1] = step.serving.ids[:, -1]
    whole = made.model(rows_step(ids)).logits
    assert whole is not None
    for logits in seen:
        assert torch.allclose(logits, whole.view(3, 12, -1)[:, -1], atol=1e-10)


def timed_by(monkeypatch: pytest.MonkeyPatch, seconds: Any) -> None:
    """Steps that take what `seconds(batch, context)` says, and nobody's time."""
    monkeypatch.setattr(Step, "seconds", lambda self: seconds(self.serving.load.batch, self.context))


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda batch, context: 1e-3 + 2e-4 * batch + 5e-6 * batch * context)
    made = subject(dtype=torch.float32)
    *cells, line = decode_fit.measure(made, batches=(1, 3), contexts=(6, 12), seconds=0.05)
    assert [(r["batch"], r["context"]) for r in cells] == [(1, 6), (1, 12), (3, 6), (3, 12)]
    per_token = 2 * 2 * 2 * 8 * 4  # layers, k and v, heads, width, bytes
    for row in cells:
        assert row["state_bytes"] == row["batch"] * row["context"] * per_token
        assert row["seconds"] == pytest.approx(row["fitted_s"])
    assert line["cell"] == "fit" and line["cells"] == 4 and line["r2"] == pytest.approx(1)
    assert line["worst_error"] == pytest.approx(0, abs=1e-9)
    assert line["spread"] == pytest.approx((1e-3 + 6e-4 + 18e-5) / (1e-3 + 2e-4 + 3e-5))
    assert (line["seconds_fixed"], line["seconds_per_sequence"]) == pytest.approx((1e-3, 2e-4))
    assert line["seconds_per_cached_token"] == pytest.approx(5e-6)
    assert line["state_byte_s"] == pytest.approx(per_token / 5e-6) and line["memory_byte_s"] > 1e8


def test_what_the_positions_do_not_reach_is_left_out_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda batch, context: 1e-3 * batch + 1e-4 * context)
    made = subject(spec({"kind": "learned"}), dtype=torch.float32)
    rows = decode_fit.measure(made, batches=(1, 3), contexts=(6, 12, 17), seconds=0.05)
    assert [r["context"] for r in rows if "end at 16" in str(r.get("reason"))] == [17, 17]
    assert rows[-1]["cells"] == 4 and rows[-1]["seconds_fixed"] is not None
    none = decode_fit.measure(made, batches=(1, 3), contexts=(17, 18), seconds=0.05)[-1]
    assert none["cells"] == 0 and none["r2"] is None and "four or more" in none["reason"]


def test_a_state_that_does_not_grow_has_no_term_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda batch, context: 1e-3 * batch)
    made = subject(change(spec(), {"blocks.b.mixer": LINEAR}), dtype=torch.float32)
    *cells, line = decode_fit.measure(made, batches=(1, 3), contexts=(6, 12), seconds=0.05)
    assert [row["seconds"] for row in cells] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert line["r2"] is None and "between which the state of a sequence grows" in line["reason"]


def test_times_that_do_not_grow_imply_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_by(monkeypatch, lambda batch, context: 1e-2 - 1e-5 * batch * context)
    line = decode_fit.measure(subject(), batches=(1, 3), contexts=(6, 12), seconds=0.05)[-1]
    assert line["seconds_per_cached_token"] == pytest.approx(-1e-5) and line["state_byte_s"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": [8]}, r"decode_fit: batches: \[8\]; accepted: two or more sizes of at least 1"),
        ({"batches": [8, 8]}, "two or more sizes"),
        ({"batches": [0, 8]}, "at least 1"),
        ({"contexts": [1, 64]}, r"decode_fit: contexts: \[1, 64\]; accepted: two or more sizes of at least 2"),
        ({"contexts": []}, "contexts"),
        ({"seconds": 0}, "decode_fit: seconds: 0; accepted: above 0"),
    ],
)
def test_options_that_leave_nothing_to_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_fit.measure(subject(), **given)


def test_turns_share_the_time_and_mix() -> None:
    """The one that takes four times as long has a quarter of the turns, spread over the whole; each has three."""
    clock, order = [0.0], []

    def call(name: str, takes: float) -> Any:
        def run() -> list[float]:
            clock[0] += takes
            order.append(name)
            return [takes]

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving.time, "perf_counter", lambda: clock[0])
        found = serving.in_turns([call("quick", 1.0), call("slow", 4.0)], 80.0)
        assert abs(len(found[0]) - 4 * len(found[1])) <= 4 and clock[0] <= 84.0
        assert "quick" * 5 not in "".join(order) and order.index("slow") < 5
        assert [len(f) for f in serving.in_turns([call("a", 1.0), call("b", 9.0)], 0.0)] == [3, 3]


def test_a_serving_decodes_from_its_prompt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the full context it stands where it began: the same logits, with no prompt read twice."""
    made = build(spec(), 0).eval()
    run, seen = serving.Serving(made, serving.Load(2, 12, 3)), []
    choose = run.choose
    monkeypatch.setattr(run, "choose", lambda logits: (seen.append(logits.clone()), choose(logits))[1])
    run.prefill()
    opened = run.opened
    for _ in range(6):
        next(run.tokens)()
    assert run.opened is opened and len(seen) == 7
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen[1:4], seen[4:7], strict=True))
