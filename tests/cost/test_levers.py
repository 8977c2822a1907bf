"""What is largest, and what each change saves: against bytes by hand and against a bill of the changed model."""

from __future__ import annotations

from typing import Any

import pytest

from assay.cost.bill import Question, Sheet, bill
from assay.cost.levers import Largest, largest
from assay.spec.load import load_model, validate
from assay.spec.model import ModelSpec
from tests.cost.models import decoder, gemma3_27b, gpt2, llama3_8b, mixtral_8x7b, small

GIB = 2**30


def of(spec: ModelSpec, **question: Any) -> tuple[Largest, dict[str, int]]:
    found = largest(Sheet(spec), bill(spec, Question(**question)))
    return found, {x.change: x.saves for x in found.levers}


def test_the_cache_of_a_long_context() -> None:
    """Gemma 3 27B without its windows: 62 GiB of keys and values; a quarter of the heads leaves a quarter of them."""
    found, saves = of(gemma3_27b(["global"]), context=131_072)
    assert (found.term, found.bytes, found.part) == ("state", 62 * GIB, None)
    assert found.of == 62 * GIB + bill(gemma3_27b(["global"]), Question(1)).weight_bytes
    assert saves["kv_heads 16 -> 4"] == 46.5 * GIB
    mixed = bill(gemma3_27b(["local"] * 5 + ["global"]), Question(131_072)).state_bytes
    assert saves["a window of 1024 in five of six layers"] == 62 * GIB - mixed
    assert saves["state in int8 instead of bf16"] == 62 * GIB - 62 * GIB * (128 + 4) // 256
    assert [x.saves for x in found.levers] == sorted(saves.values(), reverse=True)


def test_heads_that_do_not_divide() -> None:
    """14 heads, 2 of keys: 1 is next. 9 heads with as many of keys: a quarter is 2, which 9 is no multiple of."""
    for heads, change in (((14, 2), "kv_heads 2 -> 1"), ((9, 9), "kv_heads 9 -> 1"), ((12, None), "kv_heads 12 -> 3")):
        mixer = {} if heads[1] else {"kv_heads": None}
        spec = decoder(14 * 36, 2, (heads[0], heads[1] or 1), 8, 5, 1 << 20, mixer={"head_dim": 4, **mixer})
        found, saves = of(spec, context=1 << 18)
        assert found.term == "state" and change in saves


def test_what_cannot_shrink_is_not_offered() -> None:
    spec = decoder(64, 1, (4, 1), 8, 5, 1 << 20)
    found, saves = of(spec, context=1 << 18, kv_dtype="int4")
    assert (found.term, saves) == ("state", {}), "one key head, 4 bits, and not five of six layers"
    assert of(small(["linear"]), context=1 << 8, batch=1 << 12)[0].levers == (), "a recurrent state in float32"


def test_the_experts_of_mixtral() -> None:
    found, saves = of(mixtral_8x7b(), context=4096)
    routed = 3 * 32 * 8 * 4096 * 14_336
    assert (found.term, found.part, found.part_bytes) == ("weights", "experts", 2 * routed)
    assert saves["experts 8 -> 4"] == 2 * (routed // 2 + 32 * 4 * 4096), "and their rows of the router"
    assert saves["width 14336 -> 7168"] == 2 * routed // 2
    assert saves["a head tied to the table"] == 2 * 32_000 * 4096


def test_dense_weights() -> None:
    found, saves = of(llama3_8b(), context=16, dtype="f32")
    ffn = 3 * 32 * 4096 * 14_336
    assert (found.term, found.part, found.part_bytes) == ("weights", "ffns", 4 * ffn)
    assert saves["weights in bf16 instead of f32"] == 2 * 8_030_261_248 and saves["width 14336 -> 7168"] == 2 * ffn
    assert "a head tied to the table" not in of(gpt2(), context=16)[1]


@pytest.mark.parametrize("name", ["gpt-11m", "llama-11m"])
def test_a_saving_is_the_difference_of_two_bills(name: str) -> None:
    ask: dict[str, Any] = {"context": 256, "batch": 64}
    found, saves = of(load_model(name), **ask)
    heads = {"gpt-11m": 1, "llama-11m": 1}[name]
    now, then = (bill(load_model(name, c), Question(**ask)) for c in ({}, {"blocks.*.mixer.kv_heads": heads}))
    change = next(c for c in saves if c.startswith("kv_heads"))
    assert found.term == "state" and change.endswith("-> 1")
    assert saves[change] == now.state_bytes - then.state_bytes


def test_blocks_in_full_are_changed_too() -> None:
    """`stages` instead of the sugar, and a block of its own for each layer."""
    stage = {"branches": [{"mixer": {"kind": "gqa", "heads": 4, "kv_heads": 4}}]}
    tree = {"d_model": 16, "vocab": 19, "layers": 2, "context": 1 << 20, "pattern": ["a", "b"]}
    tree["blocks"] = {"a": {"stages": [stage]}, "b": {"mixer": {"kind": "gqa", "heads": 4}}}
    found, saves = of(validate(ModelSpec, tree, "stages"), context=4096)
    assert saves["kv_heads 4 -> 1"] == found.bytes * 3 // 4
