"""What a decoded token costs in calls: latent attention, experts, state spaces and delta rules, layer by layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from assay.cache import PageSize
from assay.engine.course import Recorded
from assay.engine.runner import Runner
from assay.model.lm import build
from assay.ops.tape import Tape
from assay.spec.load import load_model

LATENT = {"kind": "mla", "heads": 4, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 16, "position": "rope"}
FAMILIES: dict[str, dict[str, Any]] = {
    "mla": {"blocks.block.mixer": LATENT},
    "moe": {"blocks.block.ffn": {"kind": "moe", "experts": 4, "width": 32}},
    "mamba2": {"blocks.block.mixer": {"kind": "mamba2", "head_dim": 16}},
    "gated_deltanet": {"blocks.block.mixer": {"kind": "gated_deltanet", "heads": 2, "head_dim": 16}},
}
GATED = {"rms_norm": 2, "linears": 1, "gated": 1, "linear": 1, "add": 2}  # the ffn, and what is around both
LAYER: dict[str, dict[str, int]] = {
    "mla": {"linears": 1, "rms_norm": 1, "turn": 2, "cat": 3, "put": 1, "heads": 2, "attend": 1, "linear": 1},
    "moe": {},
    "mamba2": {
        "linears": 1, "conv": 3, "rates": 1, "scan": 1, "put": 2, "silu": 1, "mul": 1, "rms_norm": 1, "linear": 1,
    },
    "gated_deltanet": {
        "linears": 1, "conv": 3, "unit": 2, "rates": 1, "sigmoid": 1, "scan": 1, "put": 2, "rms_norm": 1, "silu": 1,
        "mul": 1, "linear": 1,
    },
}  # fmt: skip
ATTENTION = {"linears": 1, "turn": 2, "put": 2, "attend": 1, "linear": 1}
EXPERTS = {
    "rms_norm": 2, "add": 2, "linear": 1, "softmax": 1, "topk": 2, "gather": 1, "sum": 2, "clamp": 1, "div": 1,
    "experts": 2, "gated": 1, "mul": 1,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("compiled")


def taped(name: str, layers: int) -> tuple[Runner, Tape]:
    """A runner of three sequences that decode, and the tape of its steps."""
    small = {"d_model": 64, "layers": layers, "blocks.block.mixer.heads": 4, "blocks.block.ffn.width": 48}
    runner = Runner(build(load_model("llama-11m", small | FAMILIES[name])), PageSize(4, 8, 80, 32))
    slots = [runner.open(60) for _ in range(3)]
    runner.feed(slots, [[1, 2, 3, 4 + i] for i in range(3)])
    for token in range(5):
        runner.feed(slots, [[token]] * 3)
    (found,) = (one for one in runner.tapes.made.values() if isinstance(one, Recorded))
    return runner, found.tape


@pytest.mark.parametrize("name", FAMILIES)
def test_the_work_of_a_layer_is_counted(name: str) -> None:
    """Kernels and operations by name; each matrix that a kernel multiplies with is read once."""
    (_, two), (runner, four) = taped(name, 2), taped(name, 4)
    layer = Counter({key: count // 2 for key, count in (four.counts() - two.counts()).items()})
    expected = Counter(ATTENTION) + Counter(EXPERTS) if name == "moe" else Counter(LAYER[name]) + Counter(GATED)
    assert layer == expected
    once = four.counts() - Counter({key: 4 * count for key, count in layer.items()})
    assert once == {"embedding": 1, "rms_norm": 1, "linear": 1}
    read = Counter(four.addresses())
    matrices = {key: p.data_ptr() for key, p in runner.model.named_parameters() if p.dim() >= 2 and "kv_up" not in key}
    assert {key: read[at] for key, at in matrices.items()} == dict.fromkeys(matrices, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_done_beside_the_tape_does_not_grow_with_the_layers(name: str) -> None:
    """Operations of torch in a step that are not on its tape: memory taken, copies made, indices turned."""
    told = []
    for layers in (2, 4):
        runner, tape = taped(name, layers)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            runner.feed(list(runner.horizons), [[4]] * 3)
        events = Counter({e.key.removeprefix("aten::"): e.count for e in found.key_averages() if "aten::" in e.key})
        told.append({key: events[key] - tape.counts()[key] for key in ("empty", "clone", "index_copy_", "arange")})
    assert told[0] == told[1]
