"""Steps run again from tapes against the same steps in Python, and what a decoded token costs in calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.cache import PageSize, Size
from assay.engine import tapes
from assay.engine.runner import Runner, Work
from assay.engine.tapes import Recorded
from assay.model.lm import LM, build
from assay.ops.tape import Tape
from assay.spec.load import load_model

SMALL = {"d_model": 64, "layers": 2, "blocks.block.mixer.heads": 4, "blocks.block.ffn.width": 48}
ROWS, PAGES = Size(4, 120, 32), PageSize(4, 8, 80, 32)


pytestmark = pytest.mark.usefixtures("compiled")


def decoded(runner: Runner, prompts: list[list[int]], tokens: list[list[int]], company: int = 0) -> Tensor:
    """Logits [T, B, V] of a decode from these prompts; `company`: rows that leave after half of it."""
    slots = [runner.open(110) for _ in prompts]
    runner.feed(slots, prompts)
    found = []
    for t, row in enumerate(tokens):
        if t == len(tokens) // 2 and company:
            for slot in slots[-company:]:
                runner.close(slot)
            slots = slots[:-company]
        found.append(runner.feed(slots, [[i] for i in row[: len(slots)]])[: len(prompts) - company])
    return torch.stack(found)


def texts(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()


def in_python(model: LM, size: Size | PageSize) -> Runner:
    runner = Runner(model, size)
    runner.tapes.run = lambda step, states: model(step, states)  # type: ignore[method-assign]
    return runner


MIXERS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "capped": {"blocks.block.mixer.scores": {"softcap": 2.0, "sink": True}, "blocks.block.mixer.sees": {"window": 9}},
    "gated_deltanet": {"blocks.block.mixer": {"kind": "gated_deltanet", "heads": 2, "head_dim": 16}},
    "mamba2": {"blocks.block.mixer": {"kind": "mamba2", "head_dim": 16}},
    "mla": {
        "blocks.block.mixer": {"kind": "mla", "heads": 4, "kv_rank": 16, "nope_dim": 16, "rope_dim": 8, "value_dim": 16}
    },
    "moe": {"blocks.block.ffn": {"kind": "moe", "experts": 4, "width": 32}},
    "alibi": {"positions": {"rope": {"kind": "alibi", "heads": 4}}},
    "borrowed": {
        "blocks.block.mixer.gives": "kv",
        "blocks.taker": {
            "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "rope", "takes": "kv"},
            "ffn": {"kind": "gated", "width": 48},
        },
        "pattern": ["block", "taker"],
    },
    "blocks": {"blocks.block.mixer.scores": {"blocks": {"size": 8, "keep": 3}}},
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_tape_has_the_bits_of_the_step_in_python(name: str) -> None:
    """Over views that grow, sequences that leave, and pages that are no run."""
    model = build(load_model("llama-11m", SMALL | MIXERS[name]))
    size: Size | PageSize = ROWS if name in ("mamba2", "moe") else PAGES
    prompts, tokens = [row[: 9 + 3 * i] for i, row in enumerate(texts(3, 40))], texts(72, 3, 1)
    runner = Runner(model, size)
    found = decoded(runner, prompts, tokens, 1)
    torch.testing.assert_close(found, decoded(in_python(model, size), prompts, tokens, 1), rtol=0, atol=0)
    tapes = [one for one in runner.tapes.made.values() if isinstance(one, Recorded)]
    assert len(tapes) >= 2 and not runner.tapes.refused, runner.tapes.refused


def test_weights_that_moved_are_seen_and_a_changed_one_is_read() -> None:
    model = build(load_model("llama-11m", SMALL))
    runner, prompts, tokens = Runner(model, ROWS), texts(1, 9), texts(20, 1, 1)
    before = decoded(runner, prompts, tokens)
    with torch.no_grad():
        model.blocks[0].ffn.down.weight.mul_(2)
        model.blocks[1].ffn.down.weight.data = model.blocks[1].ffn.down.weight * 3
    after = decoded(runner, prompts, tokens)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, decoded(in_python(model, ROWS), prompts, tokens), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logits_tensor_stays_what_it_was_when_the_tape_runs_again(dtype: torch.dtype) -> None:
    """Unless who asked has said that it need not."""
    runner = Runner(build(load_model("llama-11m", SMALL)).to(dtype), ROWS)
    slot = runner.open(60)
    runner.feed([slot], [[1, 2, 3]])
    outs = [runner.step([Work(slot, [i])]) for i in range(4)]
    kept = outs[2].clone()
    runner.step([Work(slot, [9])])
    assert torch.equal(outs[2], kept) and not torch.equal(outs[2], outs[3]) and kept.dtype == torch.float32
    loose = runner.step([Work(slot, [10])], kept=False)
    last = runner.step([Work(slot, [11])])
    assert loose.dtype == dtype and torch.equal(loose.float(), last)


def taped(layers: int) -> tuple[Runner, Tape]:
    """A runner of three sequences that decode, and the tape of its steps."""
    model = build(load_model("llama-11m", SMALL | {"layers": layers}))
    runner = Runner(model, PAGES)
    decoded(runner, [row[: 9 + i] for i, row in enumerate(texts(3, 12))], texts(6, 3, 1))
    (found,) = (one for one in runner.tapes.made.values() if isinstance(one, Recorded))
    return runner, found.tape


@pytest.mark.parametrize(("most", "left"), [(0, 4), (1 << 30, 6)])
def test_tapes_are_kept_up_to_what_their_buffers_take(most: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six numbers of sequences, and each again: four tapes in any case, and no other bits for those that are gone."""
    monkeypatch.setattr(tapes, "HELD", most)
    model = build(load_model("llama-11m", SMALL))
    prompts, tokens, found = [row[:5] for row in texts(6, 5)], texts(3, 6, 1), []
    runners = Runner(model, Size(6, 120, 32)), in_python(model, Size(6, 120, 32))
    for runner in runners:
        told = []
        for rows in (1, 2, 3, 4, 5, 6, 1, 6):
            slots = [runner.open(60) for _ in range(rows)]
            runner.feed(slots, prompts[:rows])
            told += [runner.feed(slots, [[i] for i in row[:rows]]) for row in tokens]
            for slot in slots:
                runner.close(slot)
        found.append(torch.cat(told))
    assert torch.equal(*found)
    kept = [one.tape for one in runners[0].tapes.made.values() if isinstance(one, Recorded)]
    assert len(kept) == left
    # The last is of six rows: its logits, two layers of four activations and more, and less than all it looks at.
    logits, activations = 6 * model.spec.vocab * 4, 2 * 4 * 6 * model.spec.d_model * 4
    assert logits + activations < kept[-1].held < 20 * (logits + activations)


def test_the_work_of_a_decoded_token_is_counted() -> None:
    """Kernels a layer by name, no copy of what is stored, and every matrix read once; the rest is once a step."""
    (_, two), (runner, four) = taped(2), taped(4)
    layer = {name: count // 2 for name, count in (four.counts() - two.counts()).items()}
    assert layer == {
        "linears": 2, "linear": 2, "rms_norm": 2, "turn": 2, "put": 2, "attend": 1, "add": 2, "gated": 1
    }  # fmt: skip
    once = four.counts() - Counter({name: 4 * count for name, count in layer.items()})
    assert once == {"embedding": 1, "rms_norm": 1, "linear": 1}
    read = Counter(four.addresses())
    matrices = {name: p.data_ptr() for name, p in runner.model.named_parameters() if p.dim() == 2}
    assert {name: read[at] for name, at in matrices.items()} == dict.fromkeys(matrices, 1)


def test_what_is_done_beside_the_tape_does_not_grow_with_the_layers() -> None:
    """Operations of torch in a step, tables and tape's inputs included, and the memory that they take."""
    told = []
    for layers in (2, 4):
        runner = Runner(build(load_model("llama-11m", SMALL | {"layers": layers})), PAGES)
        slots = [runner.open(60) for _ in range(3)]
        runner.feed(slots, texts(3, 9))
        for token in (1, 2, 3):
            runner.feed(slots, [[token]] * 3)
        assert any(isinstance(one, Recorded) for one in runner.tapes.made.values())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
            runner.feed(slots, [[4]] * 3)
        events = {e.key: e.count for e in found.key_averages() if e.key.startswith("aten::")}
        told.append((sum(events.values()), events.get("aten::empty", 0)))
    assert told[0] == told[1] and told[0][0] < 320, told
