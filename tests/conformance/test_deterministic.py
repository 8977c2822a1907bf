"""The law of the same bits with compiled kernels, which the other conformance tests do without: tokens together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from assay.conform import steady
from assay.conform.cases import Case, case, every, tiny
from assay.parts.base import Part
from assay.spec.base import PartSpec
from assay.spec.registry import get

KEPT = {
    "embeds": {"token"},
    "ffns": {"dense", "gated"},
    "heads": {"lm"},
    "linears": {"dense"},
    "mixers": {"gqa"},
    "norms": {"layernorm", "rmsnorm"},
    "residuals": {"add"},
}
"""Parts that docs/serve.md names as computed 32 tokens at a time. Positions are tried in attention whose heads are too
small for the kernels; `tests/engine/test_steady.py` has them."""


pytestmark = pytest.mark.usefixtures("compiled")


def widened(spec: PartSpec) -> PartSpec:
    """With a width that the kernels serve."""
    return spec.model_copy(update={"width": 64}) if spec.slot == "ffns" and hasattr(spec, "width") else spec


def test_parts_that_keep_tokens_apart_do() -> None:
    """At every size at which they say so; all that are documented say so at one size at least."""
    found: dict[str, set[str]] = {}
    for kind in every():
        for spec in map(widened, tiny(kind)):
            if "chunking" not in spec.refusals() and steady.apart(case(spec)):
                found.setdefault(kind.slot, set()).add(kind.kind_name())
                steady.law_deterministic(case(spec))
    assert {slot: kinds - found.get(slot, set()) for slot, kinds in KEPT.items()} == {slot: set() for slot in KEPT}


def test_company_that_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part whose sums follow the rows beside them, and says that they do not; then one that follows the store."""
    spec = get("mixers", "gqa")(heads=2)  # type: ignore[call-arg]
    steady.law_deterministic(case(spec))
    run = Case.run

    def noisy(self: Case, x: Tensor, *rest: object, **more: object) -> Tensor:
        y = run(self, x, *rest, **more)  # type: ignore[arg-type]
        return y * (1 + 2**-7 * (x.shape[0] > 13))

    monkeypatch.setattr(Case, "run", noisy)
    with pytest.raises(AssertionError, match="other bits beside others"):
        steady.law_deterministic(case(spec))
    monkeypatch.setattr(Case, "run", run)
    monkeypatch.setattr(Part, "mingles", lambda self: "its sums are torch's")
    steady.law_deterministic(case(spec))
    monkeypatch.setattr(steady, "Paged", lambda *a: steady.Cache(a[0], steady.Size(3, 13, 8, 5, 1), torch.float32))
    with pytest.raises((AssertionError, RuntimeError)):
        steady.law_deterministic(case(spec))
