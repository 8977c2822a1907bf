"""The coordinate check of muP: how far a few steps move what a model computes, by its width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.train.evaluate import step_of
from assay.train.learner import Learner
from tests.train.small import learner, model, recipe

WIDTHS = (16, 32, 64, 128)
TAPS = ("blocks.0.mixer.mix", "blocks.0.out", "blocks.1.mixer.mix", "blocks.1.out", "logits")


def made(width: int, lr_width: int | None) -> Learner:
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "position": "rope"},
        "ffn": {"kind": "gated", "width": 2 * width},
    }
    spec = model(d_model=width, head={"kind": "lm"}, init={"std": "fan_in"}, blocks={"b": block})
    optimizer = {"lr": 2e-2, "lr_width": lr_width, "weight_decay": 0.0}
    return learner(spec, recipe(optimizer=optimizer, clip=None, schedule={"kind": "constant", "warmup": 0}))


@torch.no_grad()
def coordinates(one: Learner) -> dict[str, Tensor]:
    """On a batch that is the same for all."""
    out = one.model(step_of(next(learner().loader), frozenset(TAPS)))
    return {name: value.clone() for name, value in out.taps.items()} | {"logits": out.logits.clone()}


def moved(width: int, lr_width: int | None) -> dict[str, float]:
    """The mean change of a coordinate in four steps."""
    one = made(width, lr_width)
    before = coordinates(one)
    for number in range(4):
        one.step(number, 8)
    after = coordinates(one)
    return {name: float((after[name] - before[name]).abs().mean()) for name in TAPS}


def slopes(lr_width: int | None) -> dict[str, float]:
    """Of the change's logarithm, by that of the width."""
    found = [moved(width, lr_width) for width in WIDTHS]
    octaves = math.log2(WIDTHS[-1] / WIDTHS[0])
    return {name: math.log2(found[-1][name] / found[0][name]) / octaves for name in TAPS}


@pytest.mark.parametrize("lr_width", [16, None])
def test_updates_are_of_one_size_at_all_widths_where_the_rate_is_scaled(lr_width: int | None) -> None:
    """Yang et al. 2022, arXiv 2203.03466, appendix D.1: flat under muP, and growing with the width without it."""
    found = slopes(lr_width)
    if lr_width is None:
        assert all(slope > 0.4 for slope in found.values()), found
        assert found["blocks.1.out"] > 1.0
    else:
        assert all(abs(slope) < 0.15 for slope in found.values()), found
