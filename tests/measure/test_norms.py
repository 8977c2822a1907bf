"""Times of norms: the same work everywhere, planted durations found, rounds interleaved."""

from __future__ import annotations

import importlib
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.measure import norms
from tests.measure.subjects import subject


def test_every_norm_is_its_reference() -> None:
    x, upstream = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    found = norms.parts(("layernorm", "rmsnorm"), x) | norms.functions(x)
    for name, norm in found.items():
        kind = name.partition(".")[2].replace("_", "") or name
        module = importlib.import_module(f"assay.parts.norms.{kind}")
        spec = (module.LayerNorm if kind == "layernorm" else module.RmsNorm)(eps=1e-6 if name == "rmsnorm" else 1e-5)
        expected = module.reference(spec, {}, x)
        torch.testing.assert_close(norm.run(x), expected)
        assert len(norm.weights) == (2 if kind == "layernorm" else 1)
        got, *rest = torch.autograd.grad(norm.run(x), (x, *norm.weights), upstream)
        torch.testing.assert_close(got, torch.autograd.grad(expected, x, upstream)[0])
        assert all(g.shape == (7,) for g in rest)


class Slow(torch.autograd.Function):
    """x, 2 ms forward and 6 ms backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(0.006)
        return grads[0]


def test_planted_times_are_found_in_interleaved_rounds() -> None:
    order: list[str] = []

    def named(name: str, run: Any) -> norms.Norm:
        return norms.Norm(lambda x: order.append(name) or run(x), ())

    x = torch.ones(2, 3)
    times = norms.timed({"slow": named("slow", Slow.apply), "quick": named("quick", lambda x: x * 2)}, x, x, 0.0)
    assert 0.002 <= times["slow"][0] < times["slow"][1] and times["slow"][1] >= 0.006
    assert sum(times["quick"]) < 0.004
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert rounds == ([["slow", "quick"], ["quick", "slow"]] * 4)[: norms.WARM + norms.ROUNDS]


def test_rows_of_the_model_s_sizes_and_of_others() -> None:
    rows = norms.measure(subject(), seconds=0.02)
    assert {(r["tokens"], r["width"]) for r in rows} == {(32, 16)}
    assert [r["kind"] for r in rows[:2]] == ["layernorm", "rmsnorm"] and len(rows) == 6
    base = rows[0]
    for row in rows:
        both, of = (r["forward_s"] + r["backward_s"] for r in (row, base))
        assert row["ratio"] == pytest.approx(both / of)
        assert row["forward_ratio"] == pytest.approx(row["forward_s"] / base["forward_s"])
    sizes = norms.measure(subject(), kinds=["batchnorm"], tokens=[4, 8], widths=[6], seconds=0.02)
    assert [r["kind"] for r in sizes[:2]] == ["layernorm", "batchnorm"]
    assert {(r["tokens"], r["width"]) for r in sizes} == {(4, 6), (8, 6)}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)powernorm.*batchnorm, dyt, layernorm, ngpt, rmsnorm"):
        norms.measure(subject(), kinds=["powernorm"])
    with pytest.raises(ValueError, match=r"tokens: \[0\].*from 1 on"):
        norms.measure(subject(), tokens=[0])
