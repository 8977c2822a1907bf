"""The laws that hold wherever a part runs, on CUDA; its reference stays on the CPU."""

from __future__ import annotations

import pytest

from assay.conform.cases import every
from assay.conform.suite import ANYWHERE, obeys
from assay.spec.base import PartSpec


@pytest.mark.parametrize("kind", [pytest.param(kind, id=f"{kind.slot}-{kind.kind_name()}") for kind in every()])
def test_laws(kind: type[PartSpec]) -> None:
    broken = []
    for number, spec in enumerate(kind.tiny()):
        for law in ANYWHERE:
            try:
                obeys(spec, law, "cuda")
            except Exception as error:
                broken.append(f"size {number}, {law}: {type(error).__name__}: {str(error).splitlines()[0]}")
    assert not broken, "\n".join(broken)
