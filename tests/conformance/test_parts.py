"""Every law on every registered part, at every size the part names."""

from __future__ import annotations

import pytest

from assay.conform.cases import every, tiny
from assay.conform.suite import LAWS, obeys
from assay.spec.base import PartSpec

CASES = [
    pytest.param(spec, law, id=f"{kind.slot}-{kind.kind_name()}{i}-{law}")
    for kind in every()
    for i, spec in enumerate(tiny(kind))
    for law in LAWS
]


@pytest.mark.parametrize(("spec", "law"), CASES)
def test_law(spec: PartSpec, law: str) -> None:
    obeys(spec, law)
