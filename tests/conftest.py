"""For all tests: one thread, reproducible examples, and shapes in annotations checked as the code runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config as shapes

from tests.shapes import install

torch.set_num_threads(1)
# Nothing is compiled behind a test's back: those of the kernels ask for them.
os.environ.setdefault("ASSAY_NATIVE", "0")

settings.register_profile(
    "assay",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("ASSAY_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("assay")

install()


@pytest.fixture(autouse=True)
def _shape_checks_off_for_traces(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked `traces` runs with the checks off: they would be traced with the model."""
    off = request.node.get_closest_marker("traces") is not None
    shapes.update("jaxtyping_disable", off)
    yield
    shapes.update("jaxtyping_disable", False)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels where the program looks for them."""
    from assay.ops import native
    from assay.ops.native import Kernels, Unbuildable, library

    try:
        found = Kernels(library())
    except Unbuildable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "kernels", lambda: found)
