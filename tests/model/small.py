"""Small models in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.model.lm import LM, build
from assay.ops.step import Step, training_step
from assay.spec.load import validate
from assay.spec.model import ModelSpec

VOCAB = 17
BLOCK: dict[str, Any] = {
    "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "position": "p"},
    "ffn": {"kind": "gated", "width": 24},
}


def spec(block: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    tree = {"d_model": 16, "vocab": VOCAB, "layers": 2, "context": 32, "positions": {"p": "rope"}}
    return validate(ModelSpec, {**tree, "blocks": {"b": {**BLOCK, **(block or {})}}, **changes}, "here")


def made(block: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> LM:
    wide = {"init": {"std": "fan_in", "embed": 1.0, "depth": False}, **changes}
    return build(spec(block, **wide), seed).double()


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def packed(tokens: Tensor, lengths: list[list[int]]) -> Step:
    """Rows of documents; the last length of a row that is left over is padding."""
    width = sum(lengths[0])
    seq, index, number = [], [], 0
    for row in lengths:
        assert sum(row) == width
        for n in row:
            seq += [number] * n
            index += range(n)
            number += 1
    grid = (len(lengths), width)
    return training_step(tokens, torch.tensor(seq), torch.tensor(index), grid, 32)


def logits(lm: LM, step: Step) -> Tensor:
    out = lm(step).logits
    assert out is not None
    return out


def loss(lm: LM, step: Step, targets: Tensor, options: Any = None) -> dict[str, Tensor]:
    out = lm(step, targets=targets, options=options).loss
    assert out is not None
    return out
