"""Whether a model, a recipe and its data fit one another."""

from __future__ import annotations

from assay.data.dataset import Data
from assay.data.tasks.base import Task
from assay.spec.model import ModelSpec
from assay.train.parallel.spec import AXES
from assay.train.recipe import Recipe


def check(spec: ModelSpec, recipe: Recipe, data: Data) -> None:
    """ValueError when the model cannot be trained with this recipe."""
    length, ids = recipe.batch.length, data.tokenizer.vocab_size
    if spec.head is None:
        raise ValueError("model.head: null; a model that is trained needs a head")
    if spec.encoder is not None:
        _sources(spec.encoder, recipe, ids)
    if ids > spec.vocab:
        raise ValueError(f"model.vocab: {spec.vocab}; the recipe's tokenizer has {ids} ids: accepted: {ids} or more")
    if length > spec.context:
        raise ValueError(
            f"recipe.batch.length: {length}; model.context is {spec.context}: accepted: up to {spec.context}"
        )
    if recipe.loss.hidden and not data.tokenizer.is_bytes:
        raise ValueError(
            f"recipe.loss.hidden: {recipe.loss.hidden}; tokens are hidden behind a byte, which only a tokenizer of "
            "bytes has: accepted: recipe.tokenizer.kind=byte"
        )
    if recipe.evaluation.tokens and not data.validates:
        raise ValueError(
            "recipe.data.valid_one_in: 0 leaves nothing to validate on; recipe.evaluation.tokens=0 does without"
        )


def _sources(encoder: ModelSpec, recipe: Recipe, ids: int) -> None:
    """ValueError when an encoder has nothing to read, or cannot read it."""
    length, task = recipe.batch.length, recipe.data if isinstance(recipe.data, Task) else None
    if not recipe.loss.prefix and (task is None or task.draw(1, recipe.seed).prefix is None):
        raise ValueError(
            "model.encoder: it reads the prefix of a sequence; accepted: recipe.loss.prefix=true, or a task with a "
            "source of its own (reversal)"
        )
    if ids > encoder.vocab:
        raise ValueError(f"model.encoder.vocab: {encoder.vocab}; the recipe's tokenizer has {ids} ids: accepted: more")
    if length > encoder.context:
        raise ValueError(
            f"recipe.batch.length: {length}; model.encoder.context is {encoder.context}: accepted: up to it"
        )
    for axis in (axis for axis in AXES if axis != "data"):
        if recipe.parallel.size(axis) > 1:
            raise ValueError(
                f"recipe.parallel.{axis}: {recipe.parallel.size(axis)}; an encoder-decoder is not cut: accepted: 1, "
                "and any number along recipe.parallel.data"
            )
