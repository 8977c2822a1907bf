"""Training memory: what is predicted against what autograd saves, and against bytes by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.conform.cases import case, noise
from assay.cost.bill import Placed, Question, Sheet
from assay.cost.memory import need_of, training
from assay.cost.scans import is_recurrence, recurrent_bytes
from assay.model.lm import build, weight_table
from assay.ops.attend import call
from assay.ops.step import rows_step
from assay.spec import registry
from assay.spec.base import PartSpec, Site
from assay.spec.load import load_model, validate
from assay.spec.model import ModelSpec
from assay.train.memory import SavedForBackward
from assay.train.precision import Runner
from tests.cost.models import MIXERS, decoder, llama3_8b, small


def is_recurrent(kind: type[PartSpec]) -> bool:
    """Whether it remembers one state a sequence, whatever its length."""
    mixer = next(kind.tiny())
    fields = mixer.state(Site())
    return bool(fields) and {field.per for field in fields} == {"sequence"}


def saved(spec: ModelSpec, rows: int, length: int, precision: str = "float32") -> int:
    """Bytes that a forward pass leaves for the backward pass, by autograd's own account."""
    model, ids = build(spec).train(), torch.zeros(rows, length, dtype=torch.long)
    with SavedForBackward(model) as found:
        Runner(model, precision)(rows_step(ids), targets=ids.flatten())
    return found.bytes


MODELS: dict[str, tuple[Any, int, int, float]] = {
    "gpt-11m": (lambda: load_model("gpt-11m", {"layers": 2}), 2, 128, 0.01),
    "llama-11m": (lambda: load_model("llama-11m", {"layers": 2}), 1, 300, 0.01),
    "lab-64": (lambda: load_model("lab-64"), 2, 64, 0.01),
    "experts": (lambda: decoder(64, 2, (4, 2), 96, 100, ffn={"kind": "moe", "experts": 8}), 1, 100, 0.1),
    **{name: (lambda name=name: small([name]), 1, 200, 0.02) for name in MIXERS},
}
RECURRENT = [kind for kind, cls in registry.table("mixers").items() if is_recurrent(cls)]
ROTARY = {"kind": "retnet", "heads": 2, "position": "p", "chunk": 32}


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_saves(name: str) -> None:
    make, rows, length, within = MODELS[name]
    spec = make()
    told = training(Sheet(spec), Question(length, rows, dtype="f32"))
    assert told.need.activations + told.scores == pytest.approx(saved(spec, rows, length), rel=within)


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(("grid", "within"), [((1, 5), 0.0), ((3, 43), 0.0), ((1, 203), 0.03)])
def test_a_recurrence_keeps_what_autograd_saves(kind: str, grid: tuple[int, int], within: float) -> None:
    """In a row shorter than a chunk, in rows of chunks of which the last is not full, and in one with many chunks."""
    for spec in registry.table("mixers")[kind].tiny():
        c = case(spec)
        c.part.float()
        x = noise((grid[0] * grid[1], c.site.d_in), 1).float().requires_grad_()
        with SavedForBackward(c.part) as found:
            c.run(x, c.step(*grid))
        one = Placed(c.site, spec, True, {}, spec.state(c.site), ())
        told = recurrent_bytes(one, {}, grid, "f32")
        # Complex numbers are copied on a CPU where they are not without memory.
        assert is_recurrence(one) and told == pytest.approx(found.bytes, rel=0.12 if kind == "s4d" else within or 1e-12)


@pytest.mark.parametrize("mixer", [{"kind": "mamba2", "head_dim": 8, "state_size": 4}, ROTARY])
def test_a_model_with_recurrences_and_convolutions(mixer: dict[str, Any]) -> None:
    block = {"mixer": mixer, "conv": {"kind": "conv", "size": 3}, "ffn": {"kind": "gated", "width": 24}}
    tree = {"d_model": 16, "vocab": 19, "layers": 2, "context": 256, "positions": {"p": {"kind": "rope"}}}
    spec = validate(ModelSpec, {**tree, "blocks": {"b": block}}, "here")
    told = training(Sheet(spec), Question(203, 2, dtype="f32"))
    assert told.scores == 0 and told.need.activations == pytest.approx(saved(spec, 2, 203), rel=0.02)


@pytest.mark.parametrize("native", [False, True])
def test_activations_in_bfloat16(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of the weights are saved too, and counted with the weights. Probabilities are float32 on a CPU without
    products of bfloat16, and where it has them as wide as all else."""
    monkeypatch.setattr(call, "native_bf16", lambda: native)
    spec = load_model("llama-11m", {"layers": 2})
    told = training(Sheet(spec), Question(256, 2))
    copies = 2 * sum(w.numel for w in weight_table(spec).values())
    assert told.need.activations + told.scores == pytest.approx(saved(spec, 2, 256, "bfloat16") - copies, rel=0.05)


def test_llama_3_8b_in_mixed_precision() -> None:
    """4 + 2 bytes a weight, 4 + 2 a gradient and 8 of moments: 20 a parameter. In float32: 16."""
    sheet, count = Sheet(llama3_8b()), 8_030_261_248
    low, full = (training(sheet, Question(1, dtype=dtype)).need for dtype in ("bf16", "f32"))
    assert (low.weights, low.gradients, low.moments) == (6 * count, 6 * count, 8 * count)
    assert (full.weights, full.gradients, full.moments) == (4 * count, 4 * count, 8 * count)
    assert full == need_of(weight_table(llama3_8b()), "float32").with_activations(full.activations)


def test_recomputing_keeps_one_vector_a_block() -> None:
    """Another block adds its input alone: d values of 4 bytes a token."""
    one, two, three = (
        training(Sheet(load_model("lab-64", {"layers": n})), Question(64, 3, dtype="f32")) for n in (1, 2, 3)
    )
    assert three.recomputed - two.recomputed == 3 * 64 * 64 * 4
    assert one.recomputed == one.need.activations, "one block: nothing to gain"
    assert three.recomputed < three.need.activations / 2


def test_scores_grow_with_the_square() -> None:
    sheet = Sheet(llama3_8b())
    short, long = (training(sheet, Question(n, dtype="f32")) for n in (128, 512))
    pairs = 128 * 128 + 128 * 256 + 128 * 384 + 128 * 512  # blocks of 128 queries leave out what comes later
    assert long.scores == 4 * 32 * 32 * pairs
    logits = 4 * (1 << 22), 4 * (1 << 22)
    assert (long.need.activations - logits[1]) == 4 * (short.need.activations - logits[0])


def test_an_encoder_is_trained_too() -> None:
    inner: dict[str, Any] = {"d_model": 16, "vocab": 7, "layers": 1, "context": 32, "head": None}
    inner["blocks"] = {"e": {"mixer": {"kind": "gqa", "heads": 2, "sees": {"causal": False}}}}
    both = {"mixer": {"kind": "cross", "heads": 4}, "ffn": {"kind": "gated", "width": 8}}
    tree = {"d_model": 16, "vocab": 19, "layers": 1, "context": 32, "blocks": {"d": both}, "encoder": inner}
    spec = validate(ModelSpec, tree, "here")
    told = training(Sheet(spec), Question(80, memory=50, dtype="f32"))
    assert told.need.weights == 4 * sum(p.numel() for p in build(spec).parameters())
    model = build(spec).train()
    step = rows_step(torch.zeros(1, 80, dtype=torch.long), encode=rows_step(torch.zeros(1, 50, dtype=torch.long)))
    with SavedForBackward(model) as found:
        model(step, targets=torch.zeros(80, dtype=torch.long))
    assert told.need.activations + told.scores == pytest.approx(found.bytes, rel=0.1)
