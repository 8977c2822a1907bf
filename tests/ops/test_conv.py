"""The hand-written gradient of the short convolution against autograd through torch's own, document by document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.conv import short_conv
from assay.ops.lanes import Lanes, lanes
from assay.ops.step import training_step

C = 3


def leaf(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), taps=st.integers(2, 6), biased=st.booleans())
def test_no_gradient_crosses_documents(lengths: list[int], taps: int, biased: bool) -> None:
    seq = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)])
    step = training_step(torch.zeros_like(seq), seq, seq * 0, (1, len(seq)), 9)
    made = lanes(step, keeps=False)
    x, weight, bias, upstream = leaf(1, len(seq), C), leaf(C, taps), leaf(C) if biased else None, leaf(1, len(seq), C)
    leaves = [t for t in (x, weight, bias) if t is not None]
    y, _ = short_conv(x, weight, bias, torch.zeros(1, taps - 1, C).double(), made)
    alone = [F.pad(x[0, seq == b].T[None], (taps - 1, 0)) for b in range(len(lengths))]
    expected = torch.cat([F.conv1d(own, weight[:, None], bias, groups=C)[0].T for own in alone])[None]
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_gradient_reaches_what_was_before() -> None:
    x, past, weight = leaf(2, 5, C), leaf(2, 3, C), leaf(C, 4)
    y, _ = short_conv(x, weight, None, past, Lanes(2, 5))
    expected = F.conv1d(torch.cat([past, x], 1).mT, weight[:, None], groups=C).mT
    upstream = torch.randn_like(y)
    leaves = (x, past, weight)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_tap_of_lower_precision_is_computed_in_the_higher() -> None:
    """Float32 weights over bfloat16 inputs, as a state of another dtype would bring them."""
    x, weight = leaf(1, 6, C).detach().bfloat16().requires_grad_(), leaf(C, 3).detach().float().requires_grad_()
    y, _ = short_conv(x, weight, None, torch.zeros(1, 2, C), Lanes(1, 6))
    assert y.dtype == torch.float32
    exact = F.conv1d(F.pad(x.float().mT, (2, 0)), weight[:, None], groups=C).mT
    assert torch.allclose(y, exact, atol=1e-6)
    by_x, by_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert by_x.dtype == torch.bfloat16 and by_weight.dtype == torch.float32
