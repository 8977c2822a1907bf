"""What no cache keeps is not billed: encoders, classifiers and models of embeddings remember nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.cache import Cache, Size
from assay.cost.bill import Question, Sheet, bill
from assay.cost.hardware import roofline
from assay.engine.runner import Runner
from assay.hub.family import read
from assay.model.lm import build, state_table
from assay.spec.load import change
from assay.spec.model import ModelSpec
from tests.cost.models import small
from tests.cost.test_hardware import BOX
from tests.hub import encoders

STATE = ("state_bytes_per_token", "state_bytes", "reserved_bytes", "state_bytes_read")


def spec_of(name: str) -> ModelSpec:
    config, model, values = encoders.MADE[name]
    made: Any = config(**values, architectures=[model.__name__])
    return read(made.to_dict()).spec


def without_cache() -> dict[str, ModelSpec]:
    """Encoders, both halves' reading ones, and a decoder of which vectors are wanted."""
    found = {name: spec_of(name) for name in encoders.MADE if name not in encoders.TWO_SIDED}
    halves = {f"{name}'s encoder": spec_of(name).encoder for name in encoders.TWO_SIDED}
    pooled = change(small(["full", "linear"]), {"head": {"kind": "pooled", "pool": "last"}})
    return {**found, **{name: half for name, half in halves.items() if half is not None}, "embeddings": pooled}


@pytest.mark.parametrize("name", without_cache())
def test_a_model_that_continues_nothing_keeps_nothing(name: str) -> None:
    """The engine makes no cache for it."""
    spec = without_cache()[name]
    with pytest.raises(ValueError, match="does not continue text"):
        Runner(build(spec), Size(2, 30))
    told = bill(spec, Question(30, batch=2))
    assert [getattr(told, key) for key in STATE] == [0] * 4
    assert all(getattr(layer, key) == 0 for layer in told.layers for key in STATE)
    assert told.params["total"] and told.flops["prefill"] and told.flops["train_per_token"]
    assert told.flops["decode_per_token"] == told.flops["decode_per_token_executed"] == 0
    assert all(layer.decode_flops == layer.decode_executed == 0 for layer in told.layers)
    sheet = Sheet(spec)
    assert sheet.decode_flops(Question(30)) == 0
    assert (found := roofline(sheet, told, BOX)).decode_tok_s == 0 and found.prefill_s > 0


@pytest.mark.parametrize("name", encoders.TWO_SIDED)
def test_a_decoder_beside_an_encoder_keeps_its_own_and_the_memory(name: str) -> None:
    spec = spec_of(name)
    cache = Cache(state_table(spec), Size(2, 30, 1, 17), torch.bfloat16)
    told = bill(spec, Question(30, batch=2, memory=17))
    assert told.state_bytes == cache.reserved_bytes() > 0 and told.flops["decode_per_token"] > 0


def test_a_prefix_is_kept() -> None:
    """It comes whole, and what follows it reads it."""
    ask = Question(30)
    plain = small(["full", "grouped"])
    prefix = change(plain, {"blocks.*.mixer.sees": {"prefix": True}})
    assert Sheet(prefix).state_bytes(ask) == Sheet(plain).state_bytes(ask) > 0
