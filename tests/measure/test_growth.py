"""Cost against context: counts against closed forms, exponents against numpy and t tables, times where they belong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from assay.measure import growth
from assay.measure.decode_fit import Step
from assay.measure.growth import exponents, frozen, measure, slope
from assay.measure.serving import Serving
from assay.spec.load import change
from assay.spec.model import ModelSpec
from tests.measure.subjects import spec, subject

Rows = list[dict[str, Any]]
LENGTHS = (16, 25, 36, 64)
PAIR = 2 * 4 * 2 * 8  # layers, FLOPs of q.k and of p v, heads, width
STRIDED = {"mixer.sees": {"window": 3, "stride": 5}}
MAMBA2 = {"mixer": {"kind": "mamba2", "heads": 2, "head_dim": 8, "state_size": 4}}


def changed(changes: dict[str, Any]) -> ModelSpec:
    return change(spec(), {f"blocks.b.{path}": value for path, value in changes.items()})


def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill takes 1e-4 N^1.5 s and a decode step batch * 1e-3 N^0.5 s; what is fed is fed."""

    def prefill(self: Serving) -> list[tuple[float, float]]:
        return [(1e-4 * self.load.context**1.5, 1.0)]

    def seconds(self: Step) -> float:
        self.runner.feed(self.slots, self.last)
        for slot in self.slots:
            self.runner.cache.rewind(slot, self.context - 1)
        return float(1e-3 * len(self.slots) * self.context**0.5)

    monkeypatch.setattr(Serving, "prefill", prefill)
    monkeypatch.setattr(Step, "seconds", seconds)


def measured(patch: pytest.MonkeyPatch, changes: dict[str, Any], **options: Any) -> tuple[Rows, Rows]:
    """Rows of the cells, and the two of the exponents."""
    clock(patch)
    rows = measure(subject(changed(changes), dtype=torch.float32), contexts=LENGTHS, seconds=0.01, **options)
    return rows[:-2], rows[-2:]


@pytest.fixture(scope="module")
def attention() -> tuple[Rows, Rows]:
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch, {}, batches=(1, 2), cached=100)


def test_cells(attention: tuple[Rows, Rows]) -> None:
    cells, _ = attention
    assert [(r["batch"], r["context"]) for r in cells] == [(1, n) for n in LENGTHS] + [(2, n) for n in (16, 25, 36)]
    for row in cells:
        n, batch = row["context"], row["batch"]
        assert row["state_bytes_predicted"] == row["state_bytes_measured"] == batch * n * 2 * 2 * 16 * 4
        assert row["decode_s"] == pytest.approx(batch * 1e-3 * n**0.5)
        assert row["decode_tok_s"] == pytest.approx(batch / row["decode_s"])
        assert row["prefill_s"] == (pytest.approx(1e-4 * n**1.5) if batch == 1 else None)


def test_flops_are_those_of_the_formulas(attention: tuple[Rows, Rows]) -> None:
    """A token's linear maps: q, k, v, out, three of the feed-forward network, and the head of 256 logits."""
    linear, head = 2 * 2 * (4 * 16 * 16 + 3 * 16 * 24), 2 * 16 * 256
    for row in attention[0]:
        n, batch = row["context"], row["batch"]
        assert row["decode_mixer_flops"] == batch * PAIR * n
        assert row["decode_flops"] == row["decode_executed_flops"] == batch * (linear + head + PAIR * n)
        if batch == 1:
            assert row["prefill_mixer_flops"] == PAIR * n * (n + 1) // 2
            assert row["prefill_executed_flops"] >= n * linear + head + row["prefill_mixer_flops"]


def test_working_memory_is_held_beside_the_state(attention: tuple[Rows, Rows]) -> None:
    """Reading holds at least a layer's widest tensors, decoding little; both the whole state."""
    for row in attention[0]:
        n, state = row["context"], row["state_bytes_measured"]
        assert state < row["decode_held_bytes"] < 2 * state + 2**14
        if row["batch"] == 1:
            assert row["prefill_held_bytes"] > state + 2 * 4 * n * 24


def test_exponents_of_cells(attention: tuple[Rows, Rows]) -> None:
    cells, (prefill, decode) = attention
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode") and prefill["from_context"] == 36
    assert prefill["seconds_slope"] == pytest.approx(1.5) and decode["seconds_slope"] == pytest.approx(0.5)
    last, first = cells[3], cells[2]
    for row, phase in ((prefill, "prefill"), (decode, "decode")):
        for name in ("held_bytes", "flops", "mixer_flops", "executed_flops"):
            grown = np.log(last[f"{phase}_{name}"] / first[f"{phase}_{name}"]) / np.log(64 / 36)
            assert row[f"{name}_slope"] == pytest.approx(grown)
        assert row["seconds_low_slope"] is None  # two contexts leave nothing to judge a line by
    assert decode["mixer_flops_slope"] == pytest.approx(1.0) and 1.9 < prefill["mixer_flops_slope"] < 2


def test_a_recurrent_state_costs_the_same_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, (prefill, decode) = measured(monkeypatch, MAMBA2, batches=(1,))
    for name in ("state_bytes_measured", "decode_held_bytes", "decode_mixer_flops", "decode_executed_flops"):
        assert len({row[name] for row in cells}) == 1
    assert decode["held_bytes_slope"] == decode["mixer_flops_slope"] == pytest.approx(0, abs=1e-12)
    assert prefill["mixer_flops_slope"] == pytest.approx(1.0)


@pytest.mark.parametrize("rooted", [True, False])
def test_strided_pairs_are_counted_one_by_one(rooted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, _ = measured(monkeypatch, STRIDED, batches=(1,), root_stride=rooted)
    for row in cells:
        n = row["context"]
        window, stride = (round(n**0.5),) * 2 if rooted else (3, 5)
        pairs = [sum(q - k < window or (q - k) % stride == 0 for k in range(q + 1)) for q in range(n)]
        assert row["prefill_mixer_flops"] == PAIR * sum(pairs) and row["decode_mixer_flops"] == PAIR * pairs[-1]


def test_a_rooted_model_keeps_the_weights_and_leaves_the_subject_alone() -> None:
    made = subject(changed(STRIDED))
    model = frozen(made, 64)
    sees = model.spec.blocks["b"].mixer.sees  # type: ignore[union-attr]
    assert (sees.window, sees.stride) == (8, 8) and made.spec.blocks["b"].mixer.sees.stride == 5  # type: ignore[union-attr]
    theirs = dict(made.model.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in model.named_parameters())
    assert all(p.requires_grad for p in theirs.values()) and not any(p.requires_grad for p in model.parameters())
    assert frozen(made, None).spec == made.spec and frozen(subject(), 64).spec == spec()


@pytest.mark.parametrize(("count", "critical"), [(3, 12.706), (4, 4.303), (6, 2.776)])  # t tables, 95 %
def test_a_slope_has_the_interval_of_the_textbook(count: int, critical: float) -> None:
    x = 2.0 ** np.arange(7, 7 + count)
    y = 3e-6 * x**1.4 * np.exp(0.1 * np.random.default_rng(count).normal(size=count))
    (p, _), spread = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    half = critical * spread[0, 0] ** 0.5
    assert slope(x.tolist(), y.tolist()) == pytest.approx((p, p - half, p + half), rel=1e-3)


def test_what_has_no_exponent() -> None:
    assert slope([4, 8], [1.0, 4.0]) == (pytest.approx(2), None, None)
    assert slope([4], [1.0]) == slope([4, 8, 16], [0.0, 0.0, 0.0]) == (None, None, None)
    assert all(row["seconds_slope"] is None for row in exponents([]))


def test_what_the_positions_do_not_reach_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch)
    made = subject(spec({"kind": "learned"}), dtype=torch.float32)
    rows = measure(made, contexts=(4, 8, 17), batches=(1,), seconds=0.01)
    refused = rows[2]
    assert refused["context"] == 17 and refused["decode_s"] is None and "end at 16" in refused["reason"]
    assert rows[-1]["from_context"] == 4 and rows[-1]["seconds_slope"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contexts": [64]}, r"growth: contexts: \[64\]; accepted: 2 or more, each 2 or more"),
        ({"contexts": [1, 64]}, "contexts"),
        ({"batches": []}, r"growth: batches: \[\]; accepted: 1 or more, each 1 or more"),
        ({"batches": [0]}, "batches"),
        ({"cached": 100}, "growth: cached: 100; accepted: 128 or more"),
        ({"seconds": 0}, "growth: seconds: 0; accepted: above 0"),
    ],
)
def test_options_that_measure_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growth.measure(subject(), **given)
