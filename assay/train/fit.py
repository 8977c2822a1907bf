"""Whether a model, a recipe and its data fit one another."""

from __future__ import annotations

from assay.data.dataset import Data
from assay.spec.model import ModelSpec
from assay.train.recipe import Recipe


def check(spec: ModelSpec, recipe: Recipe, data: Data) -> None:
    """ValueError when the model cannot be trained with this recipe."""
    length, ids = recipe.batch.length, data.tokenizer.vocab_size
    if spec.head is None:
        raise ValueError("model.head: null; a model that is trained needs a head")
    if spec.encoder is not None:
        raise ValueError("model.encoder: recipes train on running text; an encoder-decoder needs pairs of texts")
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
