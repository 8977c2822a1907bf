"""Feed-forward networks: gated and dense at equal cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.parts.small import D, close, part, rows, x


@pytest.mark.parametrize("d", [384, 768, 4096])
def test_two_thirds_of_the_width_is_the_same_budget(d: int) -> None:
    """Shazeer 2020, section 3: three maps of width 8/3 d cost what two of 4 d cost."""
    from assay.parts.ffns.dense import DenseFfn
    from assay.parts.ffns.gated import Gated
    from assay.spec.base import Site

    site = Site(d_in=d, d_out=d)
    gated, dense = (spec.weights(site).values() for spec in (Gated(width=round(8 * d / 3)), DenseFfn(width=4 * d)))
    for count in (lambda w: w.numel, lambda w: w.flops):
        a, b = sum(map(count, gated)), sum(map(count, dense))
        assert abs(a - b) <= 3 * d * count(next(iter(gated))) // next(iter(gated)).numel
    assert sum(w.numel for w in dense) == 8 * d * d


def test_swiglu_is_what_torch_writes() -> None:
    c = part("ffns", "gated", width=24)
    w = c.weights()
    expected = F.linear(F.silu(F.linear(x(), w["gate.weight"])) * F.linear(x(), w["up.weight"]), w["down.weight"])
    close(c.run(x(), rows(1, 12)), expected)


@pytest.mark.parametrize(
    ("act", "theirs"),
    [
        ("relu", F.relu),
        ("relu2", lambda t: F.relu(t) ** 2),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh")),
        ("silu", F.silu),
    ],
)
def test_activations_by_name(act: str, theirs: object) -> None:
    c = part("ffns", "dense", width=2 * D, act=act, bias=True)
    w = c.weights()
    inner = theirs(F.linear(x(), w["up.weight"], w["up.bias"]))  # type: ignore[operator]
    close(c.run(x(), rows(1, 12)), F.linear(inner, w["down.weight"], w["down.bias"]))
    assert torch.isfinite(c.run(x() * 1e6, rows(1, 12))).all()
