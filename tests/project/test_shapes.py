"""The shape checks that the test run switches on do look, and can be switched off."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from assay.ops.step import rows_step
from tests.shapes import CHECKED, checked


@pytest.mark.skipif(not CHECKED, reason="ASSAY_NO_SHAPES is set")
def test_ids_that_are_not_integers_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="ids"):
        rows_step(torch.zeros(2, 3))


@pytest.mark.traces
def test_a_test_that_traces_runs_without_checks() -> None:
    assert rows_step(torch.zeros(2, 3)).grid == (2, 3)


def test_only_array_annotations_are_checked() -> None:
    @jaxtyped(typechecker=checked)
    def f(x: Float[Tensor, "N"], label: int) -> Float[Tensor, "N"]:
        return x[: len(x) - (label == "short")]

    assert f(torch.zeros(3), "not a number").shape == (3,)
    with pytest.raises(TypeCheckError, match="return value"):
        f(torch.zeros(3), "short")
