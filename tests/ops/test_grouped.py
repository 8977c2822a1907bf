"""Products of sorted rows with a matrix a group, against one product a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.grouped import backend, grouped
from assay.ops.native import Kernels
from assay.ops.native import experts as experts_module
from tests.ops.natives import DTYPES, ROUND
from tests.ops.natives import drawn as drawn_at


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


@given(
    st.integers(1, 5) | st.sampled_from((33, 64, 65)),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 150),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_each_head_has_its_own_matrix(
    kernels: Kernels, rows: int, count: int, size: int, out: int, along: bool, dtype: torch.dtype
) -> None:
    """Of which every second row is not for it, as it is stored or transposed, beside one product a head in float64."""
    w = drawn_at(1, dtype, count, 2 * (size if along else out), out if along else size)[:, 1::2]
    w, x = w.mT if along else w, drawn_at(2, dtype, rows, count, size + 3)[..., 2:-1]
    exact = torch.einsum("nhk,hok->nho", x.double(), w.double())
    margin = torch.einsum("nhk,hok->nho", x.double().abs(), w.double().abs())
    found = kernels.experts.heads(x, w.mT if along else w, along)
    if rows > 64:
        assert found is None
        return
    assert found is not None and bool(
        ((found.double() - exact).abs() <= ROUND[dtype] * exact.abs() + 1e-6 * margin).all()
    )


@given(st.sampled_from((1, 2, 5, 70, 150)), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from(DTYPES))
@example(150, 3, False, True, torch.bfloat16)  # more rows of an expert than are multiplied at once
@settings(max_examples=25)
def test_what_each_row_chose_is_one_product_an_expert(
    kernels: Kernels, rows: int, k: int, apart: bool, biased: bool, dtype: torch.dtype
) -> None:
    """Two maps at once, of a row for all its choices or for each of them, with no bit from the rows beside it. Experts
    of many rows are torch's, in bfloat16 where the CPU has products of it."""
    experts, size = 4, 21
    choice = torch.rand(rows, experts, generator=torch.Generator().manual_seed(rows)).topk(k).indices
    x = drawn_at(1, dtype, *((rows, k, size) if apart else (rows, size)))
    maps = [
        (drawn_at(2 + i, dtype, experts, f, size), drawn_at(9, dtype, experts, f) if biased else None)
        for i, f in enumerate((6, 19))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_module, "multiplies_bfloat16", lambda: True)
        if rows > 64 and rows * k > 64 * experts:
            assert kernels.experts.chosen(x, maps, choice) is None
        patch.setattr(experts_module, "multiplies_bfloat16", lambda: False)
        found = kernels.experts.chosen(x, maps, choice)
    if dtype is torch.float32 and rows > 64 and rows * k > 64 * experts:
        assert found is None
        return
    assert found is not None
    wide = (x if apart else x[:, None].expand(rows, k, size)).double()
    for (w, b), y in zip(maps, found, strict=True):
        exact = torch.einsum("nkd,nkfd->nkf", wide, w.double()[choice])
        exact = exact if b is None else exact + b.double()[choice]
        torch.testing.assert_close(y.double(), exact, rtol=ROUND[dtype], atol=1e-5)
    alone = kernels.experts.chosen(x[:1], maps, choice[:1])
    assert alone is not None and all(torch.equal(a, y[:1]) for a, y in zip(alone, found, strict=True))
