"""Rows that are known to be one sequence each: no mask is made, and the result is the oracle's."""

from __future__ import annotations

import torch

from assay.ops.attend import Scores, attend, plan
from assay.ops.attend.plan import Plan
from assay.ops.sees import Sees
from tests.ops.cases import problem


def test_a_plan_without_a_mask() -> None:
    p = problem(tokens=9, size=4)
    expected = p.run("oracle")
    for backend in ("sdpa", "matmul"):
        got = attend(p.q, p.view, p.step, p.sees, p.scores, Plan(backend, lower=True))
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    capped = Scores(0.5, softcap=2.0)
    got = attend(p.q, p.view, p.step, p.sees, capped, Plan("auto", lower=True))
    oracle = attend(p.q, p.view, p.step, p.sees, capped, p.plan("oracle"))
    torch.testing.assert_close(got, oracle, atol=1e-11, rtol=1e-11)


def test_only_for_plain_causal_rows_off_the_cpu() -> None:
    """Decided without a look at a value: the device here has none."""
    p = problem(tokens=9)
    moved = {k: v.to("meta") for k, v in vars(p.step).items() if isinstance(v, torch.Tensor)}
    step = p.step.with_(**moved, whole=True)
    layout = type(p.layout)(*(t.to("meta") for t in (p.layout.seq, p.layout.index, p.layout.positions)), True)
    assert plan(step, layout, Sees()).lower
    assert not plan(step, layout, Sees(window=3)).lower
    assert not plan(step.with_(whole=False), layout, Sees()).lower
    assert not plan(step, layout, Sees(), "tiled").lower
    assert not plan(p.step.with_(whole=True), p.layout, Sees()).lower
