"""The compiled kernels, for the tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from assay.ops import native
from assay.ops.native import Kernels, Unbuildable, library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Compiled for this run, in a folder of its own."""
    try:
        return Kernels(library(tmp_path_factory.mktemp("native", numbered=True)))
    except Unbuildable as error:
        pytest.skip(str(error))


@pytest.fixture
def used(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels where the program looks for them; the names of those that were asked."""
    asked: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            asked.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(native, "kernels", lambda: Watched())
    yield asked
