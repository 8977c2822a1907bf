"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import Live


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    with Live() as server:
        yield server
