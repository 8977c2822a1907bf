"""Small models with text to measure them on."""

from __future__ import annotations

from typing import Any

import torch

from assay.data.dataset import Dataset
from assay.measure.subject import Subject
from assay.model.lm import build
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from assay.train.loop import dataset
from assay.train.recipe import Recipe

TEXT = {"kind": "generated", "documents": 150, "document_bytes": 60}


def spec(position: dict[str, Any] | None = None, layers: int = 2, **mixer: Any) -> ModelSpec:
    """16 wide, context 16; the scheme stands under `main`, rotary unless another is given."""
    tree = {
        "d_model": 16,
        "vocab": 256,
        "layers": layers,
        "context": 16,
        "positions": {"main": position or {"kind": "rope"}},
        "blocks": {
            "b": {
                "mixer": {"kind": "gqa", "heads": 2, "position": "main", **mixer},
                "ffn": {"kind": "gated", "width": 24},
            }
        },
        "head": {"kind": "lm", "tie": True},
        "init": {"std": "fan_in", "embed": 1.0, "depth": False},
    }
    return validate(ModelSpec, tree, "test")


def recipe(length: int = 16, **more: Any) -> Recipe:
    tree = {"data": TEXT, "batch": {"rows": 2, "length": length}, "precision": "float32", **more}
    return validate(Recipe, tree, "recipe")


def subject(made: ModelSpec | None = None, how: Recipe | None = None, dtype: torch.dtype = torch.float64) -> Subject:
    """A model with random weights in float64, and text."""
    how = how or recipe()
    data: Dataset = dataset(how)
    model = build(made or spec(), seed=5).to(dtype).eval()
    return Subject(model, model.spec, how, data.tokenizer, data)
