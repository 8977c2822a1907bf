"""Shapes in annotations are checked where a test calls what is annotated, and not at every step of every engine."""

from __future__ import annotations

import pytest
from jaxtyping import config as shapes

CHECKED = frozenset({"test_chooser", "test_engine", "test_pieces", "test_runner", "test_sampler"})


@pytest.fixture(autouse=True)
def _shape_checks_off(_shape_checks_off_for_traces: None, request: pytest.FixtureRequest) -> None:
    """Two thirds of the time of a tiny model's step."""
    if request.path.stem not in CHECKED:
        shapes.update("jaxtyping_disable", True)
