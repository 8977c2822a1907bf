"""The time of a step: fits of planted costs, and a model's costs on a device against sums by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.cost.hardware import load_hardware
from assay.simulate.cost import Company, Machine, StepCost, Work, chunk_pairs, load_machine, works_of
from assay.simulate.preset import machine_of
from tests.cost.models import llama3_8b

PLANTED = StepCost(overhead=0.002, weights=0.009, token=3e-5, sequence=2e-5, context=8e-8, pair=1e-9, prompts=0.003)


def steps(cost: StepCost, noise: float, count: int = 400) -> list[dict[str, Any]]:
    """Decodes alone, prompts alone and both, some in chunks, timed as `cost` says and `noise` of it off."""
    draws = np.random.default_rng(0)
    rows = []
    for i in range(count):
        prefill = 0 if i % 3 == 0 else int(draws.integers(1, 2000))
        decodes = 0 if i % 3 == 1 else int(draws.integers(1, 200))
        past = int(draws.integers(0, 3000)) if i % 2 and prefill else 0
        work = Work(prefill, decodes, decodes * int(draws.integers(50, 4000)) + past, chunk_pairs(prefill, past))
        seconds = cost.seconds(work) * float(np.exp(draws.normal(0, noise)))
        rows.append({"prefill_tokens": prefill, "decodes": decodes, "context": work.context, "seconds": seconds})
        rows[-1]["pairs"] = work.pairs
    return rows


def test_pairs_are_counted_one_by_one() -> None:
    for tokens, past in ((1, 0), (5, 0), (3, 7)):
        assert chunk_pairs(tokens, past) == sum(past + i + 1 for i in range(tokens))


def test_a_step_waits_for_the_weights_or_for_arithmetic() -> None:
    assert PLANTED.seconds(Work(0, 8, 0, 0)) == pytest.approx(0.002 + 0.009 + 8 * 2e-5)
    assert PLANTED.seconds(Work(1000, 0, 0, 0)) == pytest.approx(0.002 + 0.03 + 0.003)
    assert PLANTED.prompt(1000) == PLANTED.seconds(Work(600, 0, 0, 0)) + 400 * 3e-5 + 1e-9 * 500_500


def test_a_fit_finds_what_was_planted() -> None:
    found = StepCost.fit(steps(PLANTED, 0.0))
    assert found.r2 > 0.999999 and max(map(abs, found.errors)) < 1e-3
    for name in ("token", "sequence", "context", "pair", "prompts"):
        assert getattr(found.cost, name) == pytest.approx(getattr(PLANTED, name), rel=0.02)
    assert found.cost.overhead + found.cost.weights == pytest.approx(0.011, rel=0.01)
    assert found.cost.weights / found.cost.token == pytest.approx(300, rel=0.05), "the knee"


def test_noise_does_not_bend_a_fit_far_and_is_reported() -> None:
    found = StepCost.fit(steps(PLANTED, 0.05))
    told = found.as_json()
    assert 0.95 < told["r2"] < 0.9999
    assert told["mean_error"] == pytest.approx(0.05 * (2 / np.pi) ** 0.5, rel=0.15), "of a normal error"
    assert abs(told["bias"]) < 0.01 and told["worst_error"] < 0.25
    for work in (Work(0, 50, 50_000, 0), Work(512, 30, 30_000, chunk_pairs(512))):
        assert found.cost.seconds(work) == pytest.approx(PLANTED.seconds(work), rel=0.03)


def test_steps_that_scatter_take_as_long_together_as_they_took() -> None:
    """Least squares of relative errors alone would leave them a tenth too short."""
    rows = steps(PLANTED, 0.4)
    cost = StepCost.fit(rows).cost
    works = [Work(row["prefill_tokens"], row["decodes"], row["context"], row["pairs"]) for row in rows]
    assert sum(map(cost.seconds, works)) == pytest.approx(sum(row["seconds"] for row in rows), rel=1e-9)


def decoding(cost: StepCost, noise: float) -> list[dict[str, Any]]:
    """A prompt, then steps of one to four sequences until the next; decodes `noise` off, prompts as `cost` says."""
    draws, company, rows = np.random.default_rng(1), Company(), []
    for i in range(1200):
        prefill = int(draws.integers(10, 400)) if i % 12 == 0 else 0
        decodes = 0 if prefill else 1 + i // 24 % 4
        work = Work(prefill, decodes, 100 * decodes, chunk_pairs(prefill), company.fresh(prefill, decodes))
        off = 1.0 if prefill else float(np.exp(draws.normal(0, noise)))
        row = {"prefill_tokens": prefill, "decodes": decodes, "context": work.context}
        rows.append({**row, "seconds": cost.seconds(work) * off})
    return rows


def test_a_step_is_fresh_until_its_sequences_are_known() -> None:
    rows = [(0, 1), (0, 1), (0, 1), (0, 2), (0, 2), (0, 2), (5, 2), (0, 2), (0, 2), (0, 2), (0, 1)]
    steps = [{"prefill_tokens": p, "decodes": d, "context": 9} for p, d in rows]
    assert [work.fresh for work in works_of(steps)] == [1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    assert sum(works_of(steps), Work(0, 0, 0, 0.0)).fresh == 7


def test_what_a_new_batch_costs_is_found() -> None:
    planted = PLANTED.model_copy(update={"fresh": 0.02})
    found = StepCost.fit(decoding(planted, 0.0))
    assert found.r2 > 0.999999 and found.cost.fresh == pytest.approx(0.02, rel=1e-3)


def test_decodes_that_scatter_make_no_prompt_dearer() -> None:
    """Errors relative to what was measured, and a sum made equal, would find them nearly twice as dear."""
    rows = decoding(PLANTED.model_copy(update={"fresh": 0.02}), 0.6)
    cost = StepCost.fit(rows).cost
    for prompts in (True, False):
        some = [(work, row["seconds"]) for work, row in zip(works_of(rows), rows) if (work.prefill > 0) == prompts]
        assert sum(cost.seconds(work) for work, _ in some) == pytest.approx(sum(took for _, took in some), rel=0.03)


def test_no_cost_is_below_zero() -> None:
    """Steps that get quicker with their context: plain least squares would say so."""
    rows = [{"prefill_tokens": 0, "decodes": n, "context": 100 * n, "seconds": 1 / (1 + n)} for n in range(1, 20)]
    assert min(StepCost.fit(rows).cost.model_dump().values()) >= 0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="7 steps; accepted: eight or more"):
        StepCost.fit(steps(PLANTED, 0.0, 7))
    with pytest.raises(ValueError, match="above 0 seconds"):
        StepCost.fit([{**row, "seconds": 0.0} for row in steps(PLANTED, 0.0, 9)])


def test_llama_on_an_h100_by_hand() -> None:
    """Half of 3.35 TB/s and of 989.4 TFLOP/s; 32 layers, 8 key-value heads of 128, 2 bytes each."""
    found = machine_of(llama3_8b(), load_hardware("h100"), share=0.5, overhead=0.002)
    state = 32 * 2 * 8 * 128 * 2
    read = 8_030_261_248 - 128_256 * 4096  # of the input table only rows are read
    assert found.state_bytes == state == 131_072
    assert found.step.context == pytest.approx(state / (0.5 * 3.35e12))
    assert found.step.weights == pytest.approx(2 * read / (0.5 * 3.35e12), rel=1e-6)
    assert found.step.token == pytest.approx(2 * read / (0.5 * 989.4e12), rel=0.001), "norms multiply nothing"
    assert found.step.pair == pytest.approx(32 * 32 * 128 * 4 / (0.5 * 989.4e12))
    assert found.capacity == int((0.9 * 80e9 - 2 * 8_030_261_248) / state)
    shipped = load_machine("h100-llama-3-8b")
    assert shipped.model_copy(update={"name": found.name}) == found


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for state"):
        machine_of(llama3_8b(), load_hardware("m4"), share=0.5)
    with pytest.raises(ValueError, match="share: 0; accepted"):
        machine_of(llama3_8b(), load_hardware("h100"), share=0)


def test_a_machine_comes_back_from_its_file(tmp_path: Path) -> None:
    one = Machine(name="mine", step=PLANTED, capacity=1000, state_bytes=12.5)
    one.save(tmp_path / "mine.yaml")
    assert load_machine(tmp_path / "mine.yaml") == one
    (tmp_path / "mine.yaml").write_text("step: {token: -1}\n")
    with pytest.raises(ValueError, match=r"step\.token: "):
        load_machine(tmp_path / "mine.yaml")


def test_simulating_needs_no_torch() -> None:
    program = "import sys\nfrom assay.cli.main import main\n"
    program += "assert main(['simulate', 'code', '--requests', '3', '--json']) == 0\n"
    program += "import assay.simulate.check\nassert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
