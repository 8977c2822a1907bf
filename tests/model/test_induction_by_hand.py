"""Two layers of attention whose weights are written down, and not learned, recall at any length (Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022, arXiv 2209.11895): the first brings each token
the one before it, the second looks for the places behind the token that is asked and copies what stands there."""

from __future__ import annotations

import pytest
import torch

from assay.data.task_rows import batch_of
from assay.data.tasks.base import task_class
from assay.model.lm import LM, build
from assay.ops.step import training_step
from assay.spec.load import validate
from assay.spec.model import ModelSpec


def circuit(vocab: int, context: int, strength: float = 60.0) -> LM:
    """A stream of three parts: the token, what the first layer adds, and the answer."""
    width = 3 * vocab
    spec = {
        "d_model": width,
        "vocab": vocab,
        "layers": 2,
        "context": context,
        "blocks": {
            "before": {
                "mixer": {"kind": "gqa", "heads": 1, "sees": {"window": 2}, "scores": {"sink": True}},
                "norm": {"place": "none"},
            },
            "look": {
                "mixer": {"kind": "gqa", "heads": 1, "scores": {"scale": strength}},
                "norm": {"place": "none"},
            },
        },
        "pattern": ["before", "look"],
        "final_norm": None,
        "head": {"kind": "lm"},
    }
    model = build(validate(ModelSpec, spec, "model"), 0, torch.device("cpu"))
    token, before, answer = (torch.eye(width)[i * vocab : (i + 1) * vocab] for i in range(3))
    weights = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    weights["embed.weight"] = token
    # No logit prefers anything, and the sink takes a third: a token receives a third of itself and of the one before.
    weights["blocks.0.mixer.v.weight"] = before.T @ token
    weights["blocks.0.mixer.out.weight"] = torch.eye(width)
    # Three times that, less the token, is the token before. The first token has half of itself there.
    weights["blocks.1.mixer.q.weight"] = token.T @ token
    weights["blocks.1.mixer.k.weight"] = token.T @ (3 * before - token)
    weights["blocks.1.mixer.v.weight"] = answer.T @ token
    weights["blocks.1.mixer.out.weight"] = torch.eye(width)
    weights["head.out.weight"] = answer
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize(("kind", "length"), [("mqar", 64), ("mqar", 256), ("induction", 64), ("induction", 1024)])
@torch.no_grad()
def test_it_answers_everything(kind: str, length: int) -> None:
    task = task_class(kind).model_validate({"kind": kind})
    task = task.longer(length // 64) if kind == "mqar" else task.resized(length=length)
    batch = batch_of(task.draw(4, seed=3))
    model = circuit(task.vocab, length)
    logits = model(training_step(batch.inputs, batch.seq, batch.index, batch.grid, length)).logits
    asked = batch.targets >= 0
    if kind == "mqar":  # a key that was asked before stands before other keys; only values are answers
        logits[:, : task.vocab // 2] = float("-inf")
    assert (logits.argmax(-1) == batch.targets)[asked].all() and asked.sum() > 100


@torch.no_grad()
def test_neither_layer_does_it_alone() -> None:
    """Without what the first brings, the second finds the token itself."""
    task = task_class("induction").model_validate({"kind": "induction"})
    batch = batch_of(task.draw(4, seed=3))
    model = circuit(task.vocab, task.length)
    model.get_parameter("blocks.0.mixer.out.weight").zero_()
    logits = model(training_step(batch.inputs, batch.seq, batch.index, batch.grid, task.length)).logits
    asked = batch.targets >= 0
    assert (logits.argmax(-1) == batch.targets)[asked].float().mean() < 0.1
