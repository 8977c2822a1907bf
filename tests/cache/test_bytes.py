"""Bytes predicted, bytes allocated, bytes published."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.cache import Cache, Size, predict
from assay.model.lm import state_table
from assay.ops.step import Memory, rows_step
from assay.spec.base import StateField
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.cache.models import spec

GIB = 2**30


@given(
    kinds=st.lists(st.sampled_from(["full", "window", "chunk", "linear"]), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    chunk=st.integers(1, 8),
    saves=st.integers(1, 3),
)
def test_allocated_is_predicted(kinds: list[str], rows: int, length: int, chunk: int, saves: int) -> None:
    fields, size = state_table(spec(kinds)), Size(rows, length, chunk, saves=saves)
    store, told = Cache(fields, size, torch.bfloat16), predict(fields, size, "bfloat16")
    assert sum(t.numel() * t.element_size() for _, t in store.tensors()) == told.reserved == store.reserved_bytes()
    by_hand = sum(
        2 * 2 * 4 * 2 * min(length, 5 if k in ("window", "chunk") else length) for k in kinds if k != "linear"
    )
    by_hand += kinds.count("linear") * 4 * (2 * 8 * 8 + 2 * 8)
    assert told.stored == rows * by_hand
    assert predict(fields, Size(rows, length), "bfloat16").headroom == 0


def gemma3(pattern: list[str]) -> ModelSpec:
    """The shape of Gemma 3 27B (arXiv 2503.19786): 62 layers, 16 key-value heads of 128, window 1024."""
    blocks = {
        name: {"mixer": {"kind": "gqa", "heads": 32, "kv_heads": 16, "head_dim": 128, "sees": sees}}
        for name, sees in (("local", {"window": 1024}), ("global", {}))
        if name in pattern
    }
    tree = {"d_model": 5376, "vocab": 262_208, "layers": 62, "context": 131_072, "blocks": blocks, "pattern": pattern}
    return validate(ModelSpec, tree, "gemma3")


@pytest.mark.parametrize(("context", "interleaved", "full"), [(32_768, 2.91, 15.5), (131_072, 10.41, 62.0)])
def test_local_global_interleaving(context: int, interleaved: float, full: float) -> None:
    """5:1 with a window of 1024: by hand 52 layers keep 1024 tokens and 10 keep all, 2 * 16 * 128 * 2 bytes each."""
    mixed = predict(state_table(gemma3(["local"] * 5 + ["global"])), Size(1, context), "bfloat16").reserved
    whole = predict(state_table(gemma3(["global"])), Size(1, context), "bfloat16").reserved
    assert mixed == (52 * 1024 + 10 * context) * 2 * 16 * 128 * 2
    assert (round(mixed / GIB, 2), round(whole / GIB, 2)) == (interleaved, full)
    assert math.isclose(mixed / whole, (52 * 1024 + 10 * context) / (62 * context), rel_tol=1e-3)


def test_memory_is_written_once_and_read_later() -> None:
    """Cross-attention's fields: two memories of different lengths, kept through later steps."""
    fields = {"cross": (StateField("k", "memory", (2,)),), "self": (StateField("k", "token", (1,)),)}
    store = Cache(fields, Size(2, 6, 2, memory=4), torch.float64)
    assert store.reserved_bytes() == (2 * 4 * 2 + 2 * 6 * 1) * 8
    slots = [store.open(), store.open()]
    seq, index = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0])
    values = torch.arange(8.0).double().view(4, 2)
    step = rows_step(torch.zeros(2, 2, dtype=torch.long)).with_(memory=Memory(values, seq, index))
    for later in range(3):
        states = store.begin(slots, step)
        view = states["cross"].append(step, k=values) if later == 0 else states["cross"].view(step)
        assert view.layout.aligned
        for i, own in enumerate((values[:3], values[3:])):
            assert torch.equal(view.dense("k")[i][view.layout.seq[i] == i], own)
        store.check_integrity()
        step = rows_step(torch.zeros(2, 1, dtype=torch.long), 2 + later)
    assert store.used_bytes() == ((3 + 1) * 2 + 2 * 4) * 8
    with pytest.raises(ValueError, match="a memory of 5 tokens"):
        big = Memory(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), torch.arange(5))
        store.begin([slots[0]], rows_step(torch.zeros(1, 1, dtype=torch.long), 4).with_(memory=big))


def test_fields_that_no_store_holds_are_refused() -> None:
    for fields, message in (
        ((StateField("k", "token", (2,), every=4),), "every=4"),
        ((StateField("k", "token", (2,), keep=2), StateField("v", "token", (2,))), "must have the same entries"),
        ((StateField("k", "token", (2,), "float7"),), "accepted: model"),
    ):
        with pytest.raises(ValueError, match=message):
            Cache({"part": fields}, Size(1, 8), torch.float32)
    with pytest.raises(ValueError, match="rows is 0"):
        Size(0, 8)
