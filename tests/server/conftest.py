"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config as shapes

from tests.server.live import Live


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with Live() as server:
        yield server


@pytest.fixture(autouse=True)
def _shape_checks_off(_shape_checks_off_for_traces: None) -> None:
    """What is computed is the engine's, whose own tests check shapes: three quarters of the time that a token takes."""
    shapes.update("jaxtyping_disable", True)
