"""The shape checks that the test run switches on do look, and can be switched off."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from assay.parts.positions.rope import turn
from tests.shapes import CHECKED, checked


def wrong() -> tuple[Tensor, Tensor, Tensor]:
    """Two tokens of 3 heads of 4, and angles for one token: torch would broadcast them without a word."""
    return torch.zeros(2, 3, 4), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)


@pytest.mark.skipif(not CHECKED, reason="ASSAY_NO_SHAPES is set")
def test_a_shape_that_broadcasts_silently_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="cos"):
        turn(*wrong())


@pytest.mark.traces
def test_a_test_that_traces_runs_without_checks() -> None:
    assert turn(*wrong()).shape == (2, 3, 4)


def test_only_array_annotations_are_checked() -> None:
    @jaxtyped(typechecker=checked)
    def f(x: Float[Tensor, "N"], label: int) -> Float[Tensor, "N"]:
        return x[: len(x) - (label == "short")]

    assert f(torch.zeros(3), "not a number").shape == (3,)
    with pytest.raises(TypeCheckError, match="return value"):
        f(torch.zeros(3), "short")
