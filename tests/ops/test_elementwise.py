"""Elementwise recurrences against a loop over tokens in float64: outputs, last states and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.conform.cases import noise
from assay.ops.lanes import Lanes
from assay.ops.scan import elementwise as ops
from assay.ops.scan.invariant import invariant

ROWS, WIDTH = 2, 3


def ragged(length: int) -> Lanes:
    """A lane that is full and one that ends early, which continue what is stored."""
    return Lanes(ROWS, length, filled=torch.tensor([length, length // 2]))


def documents(length: int, seed: int) -> Lanes:
    """Lanes of packed documents of random lengths."""
    starts = torch.rand(ROWS, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    starts[:, 0] = False
    return Lanes(ROWS, length, segment=starts.long().cumsum(1))


def looped(a: Tensor, b: Tensor, past: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor]:
    """The definition, lane by lane and token by token."""
    rows, last = [], []
    for i in range(a.shape[0]):
        h, row = past[i], []
        for t in range(a.shape[1]):
            if lanes.segment is not None and t and lanes.segment[i, t] != lanes.segment[i, t - 1]:
                h = torch.zeros_like(h)
            h = a[i, t] * h + b[i, t]
            row.append(h)
        filled = a.shape[1] if lanes.filled is None else int(lanes.filled[i])
        rows.append(torch.stack(row))
        last.append(row[filled - 1] if filled else past[i])
    return torch.stack(rows), torch.stack(last)


def equal(
    fast: Callable[..., tuple[Tensor, Tensor]],
    slow: Callable[..., tuple[Tensor, Tensor]],
    given: list[Tensor],
    tolerance: float = 1e-11,
) -> None:
    """Both results of both functions, and the gradients of a random sum of them."""
    found = []
    for function in (fast, slow):
        leaves = [t.detach().clone().requires_grad_() for t in given]
        y, end = function(*leaves)
        total = (y * noise(tuple(y.shape), 98)).sum() + (end * noise(tuple(end.shape), 99)).sum()
        found.append([y, end, *torch.autograd.grad(total.real, leaves, materialize_grads=True)])
    for i, (mine, theirs) in enumerate(zip(*found, strict=True)):
        scale = max(1.0, float(theirs.detach().abs().max()))
        assert mine.shape == theirs.shape and float((mine - theirs).detach().abs().max()) <= tolerance * scale, i


@given(length=st.integers(1, 40), seed=st.integers(0, 99), packed=st.booleans())
def test_a_scan_is_the_loop(length: int, seed: int, packed: bool) -> None:
    lanes = documents(length, seed) if packed else ragged(length)
    a, b = noise((ROWS, length, WIDTH), seed), noise((ROWS, length, WIDTH), seed + 1)
    past = noise((ROWS, WIDTH), seed + 2)
    equal(
        lambda *t: ops.scan(*t, lanes),
        lambda *t: looped(*t, lanes),
        [a, b, past],
        1e-9,  # decays above 1 grow the states
    )


def test_a_scan_of_complex_numbers_has_their_gradient() -> None:
    a, b, past = (torch.complex(noise(s, i), noise(s, i + 9)) for i, s in enumerate([(2, 7, 3), (2, 7, 3), (2, 3)]))
    assert torch.autograd.gradcheck(ops.states, [t.requires_grad_() for t in (a / 2, b, past)])


@pytest.mark.parametrize("length", [2, 11, 24])
@pytest.mark.parametrize("cut", [0.3, 0.8])
def test_a_state_is_carried(length: int, cut: float) -> None:
    """f(x_1..T) is f(x_1..c) and then f(x_c+1..T) from what the first left."""
    a, b, past = noise((1, length, WIDTH), 1) / 2, noise((1, length, WIDTH), 2), noise((1, WIDTH), 3)
    at = max(1, int(length * cut))
    whole, end = ops.scan(a, b, past, Lanes(1, length))
    first, middle = ops.scan(a[:, :at], b[:, :at], past, Lanes(1, at))
    second, last = ops.scan(a[:, at:], b[:, at:], middle, Lanes(1, length - at))
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-13)
