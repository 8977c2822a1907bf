"""Recipes: digests, sizes, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from assay.spec.load import dump, load_model, shelf, validate
from assay.train.precision import native_bfloat16, resolve
from assay.train.recipe import PerParam, Recipe, change_recipe, load_recipe
from tests.train.small import recipe


def test_the_digest_is_the_same_for_all_seeds_and_another_for_any_other_field() -> None:
    base = recipe()
    assert recipe(seed=7).digest == base.digest
    changes: dict[str, Any] = {
        "data__seed": 1,
        "optimizer__lr": 1e-3,
        "optimizer__betas": [0.9, 0.99],
        "schedule__kind": "wsd",
        "batch__accumulate": 2,
        "tokens": 1024,
        "precision": "bfloat16",
        "clip": None,
        "loss__z": 1e-4,
        "mix__share": 0.1,
        "evaluation__points": 3,
    }
    digests = {recipe(**{path: value}).digest for path, value in changes.items()}
    assert len(digests | {base.digest}) == len(changes) + 1


def test_auto_has_no_digest_until_it_is_resolved() -> None:
    auto = recipe(precision="auto")
    with pytest.raises(ValueError, match="precision: auto"):
        _ = auto.digest
    decided = resolve(auto, "cpu")
    assert decided.precision == ("bfloat16" if native_bfloat16("cpu") else "float32")
    assert decided.digest == recipe(precision=decided.precision).digest


def test_a_recipe_survives_its_own_yaml() -> None:
    made = recipe(tokens={"per_param": 20}, mix__share=0.25)
    again = validate(Recipe, dump(made), "again")
    assert again == made and again.digest == made.digest


def test_steps_are_tokens_rounded_up_to_batches() -> None:
    assert [recipe(tokens=n).steps(999) for n in (1, 64, 65, 512)] == [1, 1, 2, 8]
    assert recipe(tokens={"per_param": 20}).steps(1000) == -(-20_000 // 64)
    assert isinstance(recipe(tokens={"per_param": 20}).tokens, PerParam)


def test_the_rate_is_scaled_by_width() -> None:
    base = recipe(optimizer__lr=4e-3, optimizer__lr_width=64)
    assert base.optimizer.peak(64) == 4e-3 and base.optimizer.peak(256) == 1e-3
    assert recipe(optimizer__lr_width=None).optimizer.peak(256) == recipe().optimizer.lr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: 0; accepted: a whole number from 1 on, or {per_param: number}"),
        ({"tokens": "many"}, "tokens: 'many'; accepted: a whole number"),
        ({"tokens": 1.5}, "tokens: 1.5; accepted"),
        ({"batch__accumulate": 3}, "batch: accumulate: 3; rows is 4"),
        ({"schedule__warmup": 2.5}, "warmup: 2.5; accepted: a share below 1"),
        ({"schedule__kind": "cosin"}, "schedule.kind"),
        ({"optimizer__betas": [0.9, 1.0]}, r"betas: \[0.9, 1.0\]; accepted"),
        ({"optimizer__momentum": 0.9}, "unknown field; accepted: kind, lr"),
        ({"mix__share": 1.5}, "mix.share"),
        ({"mix__passkey__digits": 2}, "mix: passkey: is set, but share is 0"),
        ({"schedule__decay": 0.3}, "decay: 0.3; a cosine schedule does not read it"),
        ({"schedule__kind": "constant", "schedule__final": 0.0}, "final: 0.0; a constant schedule does not read it"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_shipped_recipes_and_models_load_and_have_names_that_say_their_cost() -> None:
    tokens = [load_recipe(name).tokens for name in ("smoke", "quick", "full")]
    assert all(isinstance(n, int) for n in tokens) and tokens == sorted(tokens)  # type: ignore[type-var]
    assert {"smoke", "quick", "full"} <= set(shelf("recipes"))
    assert load_recipe("smoke", {"recipe.tokens": 8192}).tokens == 8192
    assert change_recipe(load_recipe("smoke"), {"recipe.batch.rows": 2}).batch.rows == 2
    lab = load_model("lab-64")
    assert (lab.d_model, lab.layers, lab.vocab) == (64, 2, 256)
