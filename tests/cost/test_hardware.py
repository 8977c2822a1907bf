"""Rooflines against the arithmetic by hand, and the shipped devices against their data sheets."""

from __future__ import annotations

from pathlib import Path

import pytest

from assay.cost.bill import Question, Sheet, bill
from assay.cost.hardware import Hardware, decode_seconds, load_hardware, longest, roofline
from assay.spec.load import shelf, validate
from assay.spec.model import ModelSpec
from tests.cost.models import decoder, gpt2, llama3_8b, mixtral_8x7b, small

PARAMS, TABLE = 8_030_261_248, 128_256 * 4096  # Llama 3 8B, and its input table, of which a step reads rows
STATE = 131_072
RATES = {"name": "a box", "memory_bytes": 24e9, "memory_byte_s": 1e12, "flop_s": {"bf16": 100e12}}
BOX = validate(Hardware, RATES, "box")


def test_a_decode_step_by_hand() -> None:
    """A step reads the weights once, without the input table, and the state of every sequence."""
    for batch, context in ((1, 100), (16, 4096)):
        ask = Question(context, batch)
        told = bill(llama3_8b(), ask)
        found = roofline(Sheet(llama3_8b()), told, BOX)
        step = (2 * (PARAMS - TABLE) + batch * context * STATE) / 1e12
        assert found.bound == "memory" and found.decode_s == pytest.approx(step)
        assert found.decode_tok_s == pytest.approx(batch / step)
        assert found.prefill_s == pytest.approx(max(told.flops["prefill"] / 100e12, 2 * (PARAMS - TABLE) / 1e12))
        assert found.train_tok_s == pytest.approx(100e12 / told.flops["train_per_token"])
        assert decode_seconds(Sheet(llama3_8b()), ask, BOX) == found.decode_s


def test_enough_sequences_wait_for_arithmetic() -> None:
    """At a short context, from about rate / bandwidth sequences on: 100 FLOPs a byte."""
    bounds = [roofline(Sheet(llama3_8b()), bill(llama3_8b(), Question(1, b)), BOX).bound for b in (50, 200)]
    assert bounds == ["memory", "arithmetic"]


def test_fits_devices_and_the_longest_context() -> None:
    sheet, room = Sheet(llama3_8b()), 24_000_000_000 - 2 * PARAMS
    found = roofline(sheet, sheet.bill(Question(8192)), BOX)
    assert found.fits and found.devices == 1 and found.needed_bytes == 2 * PARAMS + 8192 * STATE
    assert found.longest == room // (16 * STATE) * 16, "whole pages of 16 tokens"
    wide = roofline(sheet, sheet.bill(Question(8192, 16)), BOX)
    assert not wide.fits and wide.devices == 2 and wide.longest == room // (16 * 16 * STATE) * 16
    big = Sheet(mixtral_8x7b())
    none = roofline(big, big.bill(Question(64)), BOX)
    assert none.longest == 0 and none.devices == 4


def test_the_longest_context_ends_with_the_positions() -> None:
    assert longest(Sheet(gpt2()), Question(1), 1e12) == 1024
    assert longest(Sheet(small(["linear"])), Question(1), 1e6) is None, "a state that does not grow has no end"


def test_experts_are_read_as_far_as_tokens_use_them() -> None:
    """One token reads 2 of 8 experts, two at most 4, four and more all of them."""
    sheet, routed = Sheet(mixtral_8x7b()), 3 * 32 * 8 * 4096 * 14_336
    rest = 46_702_792_704 - routed - 32_000 * 4096
    for batch, share in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        state = sheet.state_bytes(Question(1, batch))
        assert decode_seconds(sheet, Question(1, batch), BOX) == pytest.approx(
            (2 * (rest + share * routed) + state) / 1e12
        )


def shared(takes: bool) -> ModelSpec:
    """Two layers of Llama's kind; the second borrows the first's keys and values, or has its own."""
    mixer = {"kind": "gqa", "heads": 4}
    blocks = {"a": {"mixer": {**mixer, "gives": "kv"}}, "b": {"mixer": {**mixer, "takes": "kv"} if takes else mixer}}
    tree = {"d_model": 16, "vocab": 19, "layers": 2, "context": 64, "blocks": blocks, "pattern": ["a", "b"]}
    return validate(ModelSpec, tree, "shared")


def test_borrowed_keys_are_stored_once_and_read_twice() -> None:
    alone, both = (bill(shared(takes), Question(20, 3)) for takes in (False, True))
    assert 2 * both.state_bytes == alone.state_bytes == alone.state_bytes_read == both.state_bytes_read


def test_shipped_devices() -> None:
    """Bytes a second and dense bf16 FLOPs of the makers' data sheets."""
    known = {"h100": (3.35, 989), "h200": (4.8, 989), "a100": (2.04, 312), "mi300x": (5.3, 1307), "m4": (0.12, 4)}
    assert set(known) == set(shelf("hardware"))
    for name, (tb_s, tflop_s) in known.items():
        device = load_hardware(name)
        assert round(device.memory_byte_s / 1e12, 2) == tb_s and int(device.rate("bf16") / 1e12) == tflop_s


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x\nmemory_bytes: 1.0\nmemory_byte_s: 1.0\nflop_s: {bf16: 0}", "flop_s"),
        ("name: x\nmemory_bytes: 1.0\nmemory_byte_s: -1\nflop_s: {bf16: 1.0}", "memory_byte_s"),
        ("name: x\nmemory_bytes: 1.0\nmemory_byte_s: 1.0\nflop_s: {fp4: 1.0}", "fp4"),
        ("name: x\nmemory: 1.0\nmemory_byte_s: 1.0\nflop_s: {bf16: 1.0}", "memory: unknown field"),
    ],
)
def test_a_device_of_ones_own_is_checked(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        load_hardware(path)


def test_a_dtype_without_a_rate_is_refused() -> None:
    spec = decoder(16, 1, (2, 1), 8, 5)
    with pytest.raises(ValueError, match=r"a box: flop_s: has no f32; accepted: bf16"):
        roofline(Sheet(spec), bill(spec, Question(4, dtype="f32")), BOX)
