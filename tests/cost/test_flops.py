"""FLOPs: what the machine runs against torch's counter, what the mathematics needs against counting pairs by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from assay.cache import Cache, Size
from assay.cost.bill import Question, bill
from assay.model.lm import LM, build, state_table
from assay.ops.sees import Sees
from assay.ops.step import rows_step
from assay.spec.load import change, load_model, validate
from assay.spec.model import ModelSpec
from tests.cost.models import MIXERS, small


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


@torch.no_grad()
def counted(lm: LM, *args: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        lm.eval()(*args)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", ["gpt-11m", "llama-11m", "lab-64"])
def test_shipped_models_run_what_is_billed(name: str) -> None:
    spec = load_model(name)
    assert counted(build(spec), rows_step(tokens(2, 24))) == bill(spec, Question(24, batch=2)).flops["prefill_executed"]


@pytest.mark.parametrize("layers", [[name] for name in MIXERS] + [["window", "full", "linear"]])
@pytest.mark.parametrize("length", [13, 300])
def test_mixers_run_what_is_billed(layers: list[str], length: int) -> None:
    """Short rows are multiplied whole, long ones in blocks that leave out what nobody sees."""
    spec = small(layers)
    told = bill(spec, Question(length)).flops
    assert counted(build(spec), rows_step(tokens(1, length))) == told["prefill_executed"]


BIASES = {
    "fire": ({"kind": "fire", "heads": 4, "width": 5}, lambda new, pairs: 2 * 5 * 5 * pairs),
    "shaw": ({"kind": "shaw", "head_dim": 8, "reach": 6}, lambda new, pairs: 2 * 4 * 7 * 8 * new),
    "transformer_xl": (
        {"kind": "transformer_xl", "heads": 4, "head_dim": 8, "dim": 6},
        lambda new, pairs: 2 * 4 * 6 * (8 * new + pairs),
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_that_are_products_are_billed(name: str) -> None:
    """In every layer that names them: as they run, in a prefill and for a decoded token, and by the pairs seen."""
    scheme, by_hand = BIASES[name]
    mixer = {"kind": "gqa", "heads": 4, "head_dim": 8, "position": "p"}
    alibi = {"positions.p": {"kind": "alibi", "heads": 4}, "blocks.*.mixer": mixer}
    plain = change(small(["full", "full"]), alibi)
    spec = change(plain, {"positions.p": scheme})
    told, bare = (bill(one, Question(12)).flops for one in (spec, plain))
    assert told["prefill"] - bare["prefill"] == 2 * by_hand(12, 12 * 13 // 2)
    assert told["decode_per_token"] - bare["decode_per_token"] == 2 * by_hand(1, 12)
    lm, store = build(spec), Cache(state_table(spec), Size(1, 12), torch.float32)
    assert counted(lm, rows_step(tokens(1, 12))) == told["prefill_executed"]
    slots = [store.open()]
    for i in range(12):
        step = rows_step(tokens(1, 1), i)
        executed = counted(lm, step, store.begin(slots, step))
    assert executed == told["decode_per_token_executed"]


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.parametrize("length", [4, 12])
def test_a_decoded_token_runs_what_is_billed(name: str, length: int) -> None:
    spec = small([name])
    lm, store = build(spec), Cache(state_table(spec), Size(1, length), torch.float32)
    slots = [store.open()]
    for i in range(length):
        step = rows_step(tokens(1, 1), i)
        states = store.begin(slots, step)
        executed = counted(lm, step, states)
    told = bill(spec, Question(length)).flops
    assert executed == told["decode_per_token_executed"]


sees = st.one_of(
    st.just(Sees()),
    st.builds(lambda w: Sees(window=w), st.integers(1, 9)),
    st.builds(lambda w, f: Sees(window=w, first=f), st.integers(1, 9), st.integers(0, 5)),
    st.builds(lambda c: Sees(chunk=c), st.integers(1, 9)),
    st.builds(lambda w, c: Sees(window=w, chunk=c), st.integers(1, 9), st.integers(1, 9)),
)


@given(rule=sees, length=st.integers(1, 24))
def test_visible_pairs_by_brute_force(rule: Sees, length: int) -> None:
    """4 x heads x head size for each pair that is seen, counted one by one."""

    def seen(i: int, j: int) -> bool:
        near = rule.window is None or i - j < rule.window or j < rule.first
        return j <= i and near and (rule.chunk is None or i // rule.chunk == j // rule.chunk)

    spec = attention(rule)
    linear = bill(attention(Sees(window=1)), Question(length)).flops["prefill"] - 4 * 16 * length
    pairs = sum(seen(i, j) for i in range(length) for j in range(length))
    assert bill(spec, Question(length)).flops["prefill"] - linear == 4 * 16 * pairs


def attention(rule: Sees, **changes: Any) -> ModelSpec:
    block = {"mixer": {"kind": "gqa", "heads": 4, "sees": rule.model_dump()}, "ffn": {"kind": "dense", "width": 8}}
    return validate(
        ModelSpec, {"d_model": 16, "vocab": 19, "layers": 1, "context": 64, "blocks": {"b": block}, **changes}, "here"
    )


@given(layers=st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3), length=st.integers(1, 20))
def test_prefill_is_the_sum_of_its_tokens(layers: list[str], length: int) -> None:
    """What the mathematics needs does not depend on how the tokens arrive."""
    spec = small(layers)
    one_by_one = sum(bill(spec, Question(n)).flops["decode_per_token"] for n in range(1, length + 1))
    assert bill(spec, Question(length)).flops["prefill"] == one_by_one


def test_batches_multiply_prefill_alone() -> None:
    one, three = (bill(small(["full", "linear"]), Question(10, batch=b)).flops for b in (1, 3))
    assert three["prefill"] == 3 * one["prefill"] and three["prefill_executed"] == 3 * one["prefill_executed"]
    assert three["decode_per_token"] == one["decode_per_token"] and three["train_per_token"] == one["train_per_token"]


def test_cross_attention_and_its_encoder() -> None:
    """The memory's keys and values once, then read; the encoder with the prefill, and its parameters always."""
    inner = {"d_model": 12, "vocab": 7, "layers": 2, "context": 32, "head": None}
    inner["blocks"] = {"e": {"mixer": {"kind": "gqa", "heads": 2, "sees": {"causal": False}}}}
    cross = {"mixer": {"kind": "cross", "heads": 4, "d_memory": 12}}
    both = {"stages": [{"branches": [{"mixer": MIXERS["full"]}]}, {"branches": [cross]}]}
    tree = {"d_model": 16, "vocab": 19, "layers": 2, "context": 32, "blocks": {"d": both}, "encoder": inner}
    spec = validate(ModelSpec, tree, "here")
    lm, ask = build(spec), Question(9, batch=2, memory=5)
    told = bill(spec, ask)
    step = rows_step(tokens(2, 9), encode=rows_step(tokens(2, 5)))
    assert counted(lm, step) == told.flops["prefill_executed"]
    for memory in (0, 5):
        assert bill(spec, Question(9, memory=memory)).params["total"] == sum(p.numel() for p in lm.parameters())
    per_layer = 2 * 16 * 2  # k and v, 16 values of 2 bytes
    assert told.state_bytes == 2 * 2 * per_layer * (9 + 5)
    assert told.state_bytes_per_token == 2 * per_layer
