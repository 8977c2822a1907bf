"""Products of sorted rows with a matrix a group, against one product a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.grouped import backend, grouped


def drawn(counts: list[int], d: int, f: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), d, generator=g, dtype=torch.float64)
    w = torch.randn(len(counts), f, d, generator=g, dtype=torch.float64)
    return x.to(dtype), w.to(dtype), torch.tensor(counts)


def one_by_one(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """Row i with the matrix of its group, in float64."""
    group = torch.repeat_interleave(torch.arange(len(counts)), counts)
    rows = [w[e].double() @ row.double() for row, e in zip(x, group, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, w.shape[1]).double()


@pytest.mark.parametrize(
    ("dtype", "name", "error"),
    [(torch.float64, "loop", 1e-13), (torch.float32, "kernel", 1e-5), (torch.bfloat16, "kernel", 1e-2)],
)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_equals_one_product_a_row(dtype: torch.dtype, name: str, error: float, counts: list[int]) -> None:
    """Groups without rows are passed over, also the first and the last."""
    x, w, n = drawn(counts, 8, 16, dtype)
    assert backend(x, w) == (name if sum(counts) else "loop")
    mine, theirs = grouped(x, w, n), one_by_one(x, w, n)
    assert mine.shape == theirs.shape and mine.dtype == dtype
    assert torch.allclose(
        mine.double(), theirs, rtol=0, atol=error * max(1.0, float(theirs.abs().max() if len(x) else 0))
    )


@pytest.mark.parametrize(("dtype", "d", "name", "error"), [
    (torch.float64, 8, "loop", 1e-12), (torch.float32, 8, "kernel", 1e-5), (torch.float32, 7, "loop", 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients(dtype: torch.dtype, d: int, name: str, error: float, expanded: bool) -> None:
    """Of both factors, also for a gradient that arrives expanded (a sum's)."""
    x, w, n = drawn([3, 0, 5, 1], d, 8, dtype)
    assert backend(x, w) == name
    a, b = (t.clone().requires_grad_() for t in (x, w))
    probe = torch.ones(9, 8, dtype=dtype) if expanded else torch.randn(9, 8, dtype=dtype)
    out = grouped(a, b, n)
    mine = torch.autograd.grad(out.sum() if expanded else (out * probe).sum(), [a, b])
    c, e = (t.double().requires_grad_() for t in (x, w))
    theirs = torch.autograd.grad((one_by_one(c, e, n) * probe).sum(), [c, e])
    for p, q in zip(mine, theirs, strict=True):
        assert torch.allclose(p.double(), q, rtol=0, atol=error * max(1.0, float(q.abs().max())))
    assert torch.equal(mine[1][1], torch.zeros_like(mine[1][1])), "an expert without tokens learns nothing"
