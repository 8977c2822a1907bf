"""YAML on a page, and the example files, are read by the code they are written for, and billed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import assay
from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import change, load_model, parse_yaml, validate
from assay.spec.model import BlockSpec, ModelSpec
from assay.study.claims import arms as arms_of
from assay.study.claims import parse
from assay.study.spec import StudySpec
from assay.train.recipe import Recipe, load_recipe
from tests.docs.blocks import ROOT, Block, blocks

FILES = sorted((ROOT / "docs/examples").glob("*.yaml"))
STUDIES = [path for path in FILES if path.stem.startswith("study-")]
EXAMPLES = [path for path in FILES if path not in STUDIES]


def read(tree: dict[str, Any], where: str) -> Any:
    """A model, recipe, study or block; a piece of a model is put into a shipped one."""
    if "d_model" in tree:
        return validate(ModelSpec, tree, where)
    if "title" in tree:
        return validate(StudySpec, tree, where)
    if "optimizer" in tree:
        return validate(Recipe, tree, where)
    if tree.keys() <= BlockSpec.model_fields.keys():
        return change(load_model("lab-64"), {"blocks.block": tree}, where)
    return change(load_model("lab-64"), tree, where)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda b: b.where)
def test_yaml_of_a_page_is_accepted(block: Block) -> None:
    made = read(parse_yaml(block.text, block.where), block.where)
    if isinstance(made, ModelSpec):
        assert assay.bill(made).params["total"] > 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_billed_for_what_is_built(path: Path) -> None:
    spec = load_model(path)
    total = assay.bill(spec, memory=8).params["total"]
    assert total == sum(p.numel() for p in LM(spec).parameters())
    step = rows_step(torch.arange(24).view(2, 12))
    if spec.encoder is not None:
        step = step.with_(encode=rows_step(torch.arange(16).view(2, 8)))
    logits = build(spec)(step).logits
    assert logits is not None and logits.shape == (24, spec.vocab) and bool(logits.isfinite().all())


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_an_example_study_names_its_own_arms(path: Path) -> None:
    study = validate(StudySpec, parse_yaml(path.read_text(encoding="utf-8"), path.name), path.name)
    assert load_model(study.base).layers and load_recipe(study.recipe, study.budgets["smoke"].overrides)
    assert {arm for claim in study.claims for arm in arms_of(parse(claim.test))} <= set(study.arms)


def test_the_examples_have_the_shapes_they_are_named_after() -> None:
    names = ("gemma2-shape", "gemma3-shape", "deepnorm")
    two, three, deep = (load_model(ROOT / f"docs/examples/{name}.yaml") for name in names)
    windows = [layer[0].branches[0].mixer.sees.window for layer in three.expand()]
    assert windows == [32, 32, 32, 32, 32, None] * 2
    assert two.plan == ("local", "global") * 2 and two.blocks["global"].mixer.sees.window is None
    assert all(b.mixer.scores.softcap == 50.0 for b in two.blocks.values()) and two.head.softcap == 30.0
    assert deep.expand()[0][0].residual.alpha(deep.site(0)) == pytest.approx((2 * 24) ** 0.25)
