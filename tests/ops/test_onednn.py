"""Products by oneDNN against float64, with their gradients, and who is not served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from assay.ops import onednn
from assay.ops.linear import linear


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN was asked for, on any processor and for any size."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    shapes: list[tuple[int, ...]] = []
    made = onednn._product

    def told(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append((*x.shape, len(w)))
        return made(x, w, b)

    monkeypatch.setattr(onednn, "_product", told)
    monkeypatch.setattr(onednn, "better", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 1)
    return shapes


def near(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-7 * terms)


@given(st.lists(st.integers(1, 5), min_size=0, max_size=2), st.integers(1, 70), st.integers(1, 40), st.booleans())
def test_a_product_and_its_gradients_are_those_of_float64(heads: list[int], k: int, out: int, biased: bool) -> None:
    torch.manual_seed(k * out)
    x, w, b, by = torch.randn(*heads, 7, k), torch.randn(out, k), torch.randn(out), torch.randn(*heads, 7, out)
    given = [x, w, b] if biased else [x, w]
    low, high = ([t.to(dtype).requires_grad_() for t in given] for dtype in (torch.float32, torch.float64))
    y = onednn.product(*low)
    exact = nn.functional.linear(*high)
    near(y, exact, k)
    for mine, theirs in zip(
        torch.autograd.grad(y, low, by), torch.autograd.grad(exact, high, by.double()), strict=True
    ):
        near(mine, theirs, 7 * len(by.view(-1, 7, out)) + out)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int, asked: list[tuple[int, ...]]) -> None:
    given = [torch.randn(5, 6), torch.randn(4, 6), torch.randn(4)]
    wanted = [t.requires_grad_() for i, t in enumerate(given) if i != frozen]
    onednn.product(*given).sum().backward()
    assert all(t.grad is not None for t in wanted) and given[frozen].grad is None
    assert len(asked) == (3 if frozen == 2 else 2)


def test_a_linear_map_is_one_of_them(asked: list[tuple[int, ...]]) -> None:
    x, w = torch.randn(65, 16), nn.Parameter(torch.randn(24, 16))
    linear(x, w).sum().backward()
    assert asked == [(65, 16, 24), (16, 65, 24)]  # x needs no gradient
    near(linear(x, w), x.double() @ w.double().T, 16)


def test_who_counts_operations_and_who_has_other_numbers_sees_torchs_own(asked: list[tuple[int, ...]]) -> None:
    x, w = torch.randn(65, 16), torch.randn(24, 16)
    with FlopCounterMode(display=False) as counter:
        linear(x, w)
    assert counter.get_total_flops() == 2 * 65 * 16 * 24
    linear(x.double(), w.double())
    linear(x.bfloat16(), w.bfloat16())
    assert asked == []


def test_a_processor_is_known_by_its_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    found = {}
    for maker in ("AuthenticAMD", "GenuineIntel"):
        (tmp_path / maker).write_text(f"processor : 0\nvendor_id : {maker}\n")
        monkeypatch.setattr(onednn, "CPUINFO", tmp_path / maker)
        found[maker] = onednn.better.__wrapped__()
    assert found == {"AuthenticAMD": hasattr(torch.ops.mkldnn, "_linear_pointwise"), "GenuineIntel": False}
