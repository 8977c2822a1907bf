"""From which context on the state of one model stays below that of another."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from assay.cli.main import main
from assay.cost.bill import Question, Sheet, bill, crossover
from assay.spec.load import change, load_model
from assay.spec.model import ModelSpec
from tests.cost.models import MIXERS, small

ASK = Question(1)
layers = st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3)


def between(one: ModelSpec, other: ModelSpec, ask: Question = ASK) -> int | None:
    return crossover(Sheet(one), Sheet(other), ask)


@given(one=layers, other=layers)
@example(one=["window"] * 3, other=["linear", "full"])
def test_is_what_a_walk_over_all_contexts_finds(one: list[str], other: list[str]) -> None:
    """No window here is longer than 6 and no constant is worth more than 30 tokens."""
    a, b = Sheet(small(one)), Sheet(small(other))
    above = [n for n in range(1, 60) if a.state_bytes(Question(n)) >= b.state_bytes(Question(n))]
    expected = (above[-1] + 1 if above else 1) if not above or above[-1] < 59 else None
    assert crossover(a, b, ASK) == expected


def test_a_constant_against_a_line() -> None:
    """A state of c bytes falls below p bytes a token at floor(c / p) + 1 tokens: here 576 / 64 in each layer, and the
    batch and what both have alike change nothing."""
    linear, full = small(["linear"]), small(["full"])
    assert bill(linear, Question(1)).state_bytes == 576 and bill(full, Question(1)).state_bytes == 64
    assert between(linear, full) == 10 and between(full, linear) is None
    assert between(linear, full, Question(1, batch=7)) == 10
    assert between(linear, full, Question(1, kv_dtype="f32")) == 576 // 128 + 1
    assert between(small(["linear", "full"]), small(["full", "full"])) == 10
    assert between(full, full) is None
    assert between(small(["window"]), full) == 6
    below_above_below = small(["window"] * 3), small(["linear", "full"])
    assert between(*below_above_below) == (3 * 5 * 64 - 576) // 64 + 1


def test_ends_with_the_positions() -> None:
    """A model with 256 positions is compared up to there."""
    gpt, llama = load_model("gpt-11m"), load_model("llama-11m")
    assert between(llama, gpt) == 1
    slow = change(gpt, {"blocks.*.mixer": {"kind": "linear", "heads": 6}})
    assert between(slow, gpt) == 4 * 6 * (64 * 64 + 64) // (2 * 2 * 384) + 1 == 66
    wide = change(gpt, {"blocks.*.mixer": {"kind": "linear", "heads": 1}})
    assert between(wide, gpt) is None and between(gpt, wide) == 1


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bill", "lab-64", "llama-11m", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["crossovers"] == [{"below": "lab-64", "above": "llama-11m", "context": 1}]
    assert main(["bill", "lab-64", "llama-11m"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the state of lab-64 is below that of llama-11m at every context" in said
