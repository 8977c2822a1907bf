"""State bytes against allocation, shared weights, limits, and that a bill allocates nothing."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from assay.cache import Cache, Size
from assay.cost.bill import Question, bill
from assay.model.lm import build, state_table
from assay.ops.sees import Sees
from assay.spec.load import load_model, validate
from assay.spec.model import ModelSpec
from tests.cost.models import MIXERS, gpt2, llama31_405b, small

layers = st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3)


@given(layers=layers, batch=st.integers(1, 3), context=st.integers(1, 30))
def test_stored_bytes_are_what_a_cache_allocates(layers: list[str], batch: int, context: int) -> None:
    """Fed one token at a time, a cache needs no headroom."""
    spec = small(layers)
    store = Cache(state_table(spec), Size(batch, context), torch.bfloat16)
    assert bill(spec, Question(context, batch)).state_bytes == store.reserved_bytes()


@given(layers=layers, context=st.integers(1, 60), page=st.integers(1, 20), kv=st.sampled_from(["bf16", "int8", "int4"]))
def test_pages_reserve_at_least_what_is_stored(layers: list[str], context: int, page: int, kv: str) -> None:
    told = bill(small(layers), Question(context, page=page, kv_dtype=kv))
    assert told.reserved_bytes >= told.state_bytes
    if page == 1:
        assert told.reserved_bytes == told.state_bytes


def test_pages_by_hand() -> None:
    """17 tokens in pages of 16 are two pages; a window of 5 is held by pages for 5 + 15."""
    per_token = 2 * 16 * 2
    for name, entries, reserved in (("full", 17, 32), ("window", 5, 32), ("chunk", 6, 32)):
        told = bill(small([name]), Question(17))
        assert (told.state_bytes, told.reserved_bytes) == (entries * per_token, reserved * per_token), name
    linear = bill(small(["linear"]), Question(17))
    assert linear.state_bytes == linear.reserved_bytes == 4 * (2 * 8 * 8 + 2 * 8) and linear.state_bytes_per_token == 0
    assert bill(small(["linear"]), Question(17, kv_dtype="int4")).state_bytes == linear.state_bytes


@pytest.mark.parametrize("name", ["gpt-11m", "llama-11m", "lab-64"])
def test_parameters_are_the_built_ones(name: str) -> None:
    spec = load_model(name)
    told, lm = bill(spec, Question(1)), build(spec)
    assert told.params["total"] == told.params["active"] == sum(p.numel() for p in lm.parameters())
    assert told.params["embedding"] == lm.embed.weight.numel(), "the position table is no embedding"


def test_shared_weights_count_once_and_run_twice() -> None:
    block = {"mixer": MIXERS["full"], "ffn": {"kind": "moe", "experts": 4, "width": 8}}
    tree: dict[str, Any] = {"d_model": 16, "vocab": 19, "layers": 4, "context": 64}
    free = validate(ModelSpec, {**tree, "blocks": {"b": block}}, "free")
    like = {
        "blocks": {"b": block, "c": {"like": "blocks.0"}, "d": {"like": "blocks.2"}},
        "pattern": ["b", "c", "b", "d"],
    }
    tied = validate(ModelSpec, {**tree, **like}, "tied")
    a, b = bill(free, Question(20)), bill(tied, Question(20))
    assert b.params["total"] == sum(p.numel() for p in build(tied).parameters())
    assert a.params["total"] - b.params["total"] == sum(
        x.params for x in a.layers if x.name in ("blocks.1", "blocks.3")
    )
    assert (b.flops, b.state_bytes) == (a.flops, a.state_bytes)
    routed = 3 * 16 * 8 * 4
    assert a.params["total"] - a.params["active"] == 4 * routed // 2


def test_layers_add_up() -> None:
    told = bill(small(["full", "window", "linear"]), Question(33, batch=2))
    for key, total in (("state_bytes", told.state_bytes), ("reserved_bytes", told.reserved_bytes)):
        assert sum(getattr(x, key) for x in told.layers) == total
    assert sum(x.prefill_flops for x in told.layers) == told.flops["prefill"]
    assert sum(x.decode_flops for x in told.layers) == told.flops["decode_per_token"]
    assert [x.parts for x in told.layers if x.name.startswith("blocks.")] == [
        {"mixer": kind, "ffn": "gated"} for kind in ("gqa", "gqa", "linear")
    ]


def test_a_context_past_the_table_is_refused() -> None:
    spec = gpt2()
    assert bill(spec, Question(1024)).flops["prefill"] > 0
    with pytest.raises(ValueError, match=r"context: 1025; positions\.p \(learned\) has 1024 positions: 1 to 1024"):
        bill(spec, Question(1025))
    assert bill(load_model("llama-11m"), Question(100_000)).state_bytes > 0, "RoPE has no end"


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"context": 0}, "context: 0; at least 1"),
        ({"context": 1, "batch": 0}, "batch: 0; at least 1"),
        ({"context": 1, "page": -1}, "page: -1; at least 1"),
        ({"context": 1, "memory": -1}, "memory: -1; at least 0"),
        ({"context": 1, "dtype": "fp8"}, "dtype: 'fp8'; accepted: bf16, f32, f16"),
        ({"context": 1, "kv_dtype": "int2"}, "kv_dtype: 'int2'; accepted: bf16, f32, f16, int8, int4"),
    ],
)
def test_questions_without_an_answer(ask: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Question(**ask)


class NoTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"a bill called {func}")


def test_405_billion_parameters_allocate_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch operation, a few megabytes of Python, and each part asked a fixed number of times."""
    spec, asked = llama31_405b(), 0
    pairs = Sees.pairs

    def counted(self: Sees, new: int, seen: int) -> int:
        nonlocal asked
        asked += 1
        return pairs(self, new, seen)

    monkeypatch.setattr(Sees, "pairs", counted)
    with NoTensors():
        told = bill(spec, Question(131_072))
    assert told.weight_bytes == 2 * 405_853_388_800
    assert asked <= 4 * 126, f"{asked} questions of 126 layers"
    monkeypatch.undo()
    one = llama31_405b(layers=1)
    tracemalloc.start()
    bill(one, Question(131_072))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak} bytes"
