"""What searches for causes need."""

from collections.abc import Iterator

import pytest
from jaxtyping import config as shapes


@pytest.fixture
def unchecked() -> Iterator[None]:
    """A search runs some hundred variants of a model; that their shapes are right is seen in every other test."""
    shapes.update("jaxtyping_disable", True)
    yield
    shapes.update("jaxtyping_disable", False)
