"""Shapes in annotations are checked in the steps of two files here, and where what is annotated has its own tests."""

from __future__ import annotations

import pytest
from jaxtyping import config as shapes

CHECKED = frozenset({"test_engine", "test_runner"})


@pytest.fixture(autouse=True)
def _shape_checks_off(_shape_checks_off_for_traces: None, request: pytest.FixtureRequest) -> None:
    """Two thirds of the time of a tiny model's step."""
    if request.path.stem not in CHECKED:
        shapes.update("jaxtyping_disable", True)
