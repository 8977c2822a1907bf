"""The bill of weights in 8 and 4 bits against the parameters of a model that was packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.cost.bill import Question, Sheet, bill
from assay.cost.hardware import Hardware, roofline
from assay.model.lm import build
from assay.ops.packed import held_bytes
from assay.passes.quantise import quantise
from assay.spec.load import load_model

SMALL = {"d_model": 64, "layers": 3, "blocks.block.mixer.heads": 4, "blocks.block.ffn.width": 48}
LATENT = {"kind": "mla", "heads": 4, "kv_rank": 16, "nope_dim": 8, "rope_dim": 8, "value_dim": 16, "q_rank": 24}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"head": {"kind": "lm", "bias": True}},
    "latent": {"blocks.block.mixer": LATENT},
    "state": {"blocks.block.mixer": {"kind": "mamba2", "head_dim": 16}},
    "delta": {"blocks.block.mixer": {"kind": "gated_deltanet", "heads": 2}},
    "experts": {"blocks.block.ffn": {"kind": "moe", "experts": 3, "width": 24, "router": {"kind": "topk", "k": 2}}},
    "few": {"blocks.block.ffn.width": 8},
}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", CHANGES)
def test_bytes_are_those_of_the_packed_model(name: str, dtype: str) -> None:
    spec = load_model("llama-11m", SMALL | CHANGES[name])
    model = quantise(build(spec).to(torch.bfloat16), dtype)
    held = Sheet(spec).held(Question(8, dtype=dtype))
    assert held == {key: held_bytes(p) for key, p in model.named_parameters()}
    assert bill(spec, Question(8, dtype=dtype)).weight_bytes == sum(held.values())


def test_what_is_read_is_what_is_held_and_the_rest_stays_float() -> None:
    spec = load_model("llama-11m", SMALL)
    sheet, low, half = Sheet(spec), Question(8, dtype="int4"), Question(8)
    machine = Hardware.model_validate(
        {"name": "x", "memory_bytes": 1e9, "memory_byte_s": 1e6, "flop_s": {"bf16": 1e15, "f32": 1e15}}
    )
    found, plain = (roofline(sheet, sheet.bill(ask), machine) for ask in (low, half))
    assert sheet.bill(low).state_bytes == sheet.bill(half).state_bytes
    state = sheet.state_bytes_read(half)
    assert found.decode_s == pytest.approx((sum(sheet.held(low).values()) + state) / 1e6)
    assert plain.decode_s == pytest.approx((2 * sheet.bill(half).params["total"] + state) / 1e6)
    with pytest.raises(ValueError, match="dtype: 'int3'; accepted: bf16, f32, f16, int8, int4"):
        Question(8, dtype="int3")
