"""Models and recipes of the tests: a few thousand parameters, a few steps, generated text."""

from __future__ import annotations

from typing import Any

import torch

from assay.data.dataset import Dataset
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.precision import resolve
from assay.train.recipe import Recipe, change_recipe

MODEL: dict[str, Any] = {
    "d_model": 16,
    "vocab": 256,
    "layers": 2,
    "context": 32,
    "positions": {"rope": {"kind": "rope"}},
    "blocks": {"b": {"mixer": {"kind": "gqa", "heads": 2, "position": "rope"}, "ffn": {"kind": "gated", "width": 24}}},
    "head": {"kind": "lm", "tie": True},
}
RECIPE: dict[str, Any] = {
    "data": {"kind": "generated", "documents": 40, "document_bytes": 50},
    "batch": {"rows": 4, "length": 16},
    "tokens": 512,
    "optimizer": {"lr": 4e-3, "lr_width": 16},
    "evaluation": {"tokens": 64, "points": 2},
    "precision": "float32",
}


def model(**more: Any) -> ModelSpec:
    return validate(ModelSpec, MODEL | more, "model")


def recipe(**changes: Any) -> Recipe:
    """The small recipe with dotted changes, written with two underscores for a dot."""
    made = validate(Recipe, RECIPE, "recipe")
    return change_recipe(made, {k.replace("__", "."): v for k, v in changes.items()}) if changes else made


def learner(spec: ModelSpec | None = None, how: Recipe | None = None) -> Learner:
    how = resolve(how or recipe(), "cpu")
    return Learner(spec or model(), how, data(how), torch.device("cpu"))


def data(how: Recipe | None = None) -> Dataset:
    return dataset(how or recipe())
