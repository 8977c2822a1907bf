"""Compiled kernels in training, in both of their dtypes: cross-entropy, short convolutions, norms and RoPE against
torch's own in float64 on the same numbers, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.conv import short_conv
from assay.ops.lanes import lanes
from assay.ops.norm import rms_norm, unit
from assay.ops.step import training_step
from assay.ops.vocabulary import Whole
from assay.parts.positions.rope import Rope, turn, turns
from tests.ops.natives import DTYPES, ROUND, drawn

pytestmark = pytest.mark.usefixtures("used")


def near(ours: Tensor, exact: Tensor, dtype: torch.dtype, roundings: float = 2.0) -> None:
    """To so many roundings of the dtype, of what is as large as the largest."""
    assert exact.dtype == torch.float64 and ours.shape == exact.shape
    bound = roundings * ROUND[dtype] * max(1.0, float(exact.abs().max()))
    assert float((ours.detach().double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (2, 16), (4, 17), (5, 64), (3, 65), (7, 1003)])
def test_cross_entropy(dtype: torch.dtype, rows: int, size: int, used: list[str]) -> None:
    """With rows that are no target's, a logit of -inf, and logits far from 0."""
    x = 4 * drawn(rows + size, torch.float32, rows, size)
    x[:, size // 2] += 80.0
    if size > 3:
        x[0, 1] = -torch.inf
    targets = torch.arange(rows) * 7 % size
    targets[rows // 2] = -1 if rows > 1 else 0
    ours = x.to(dtype).requires_grad_()
    exact = ours.detach().double().requires_grad_()
    found = Whole().entropy(ours, targets, 0.0, 0.0)
    expected = F.cross_entropy(exact, targets, ignore_index=-1, reduction="sum")
    assert found.nll.dtype == torch.float32 and found.objective is found.nll
    near(found.nll, expected.detach(), torch.float32, 8.0)
    (by,), (exactly,) = torch.autograd.grad(0.3 * found.nll, ours), torch.autograd.grad(0.3 * expected, exact)
    assert by.dtype == dtype
    near(by, exactly, dtype, 4.0 if dtype is torch.float32 else 1.0)
    assert used == ["entropy", "entropy_back"]


def test_cross_entropy_of_a_piece_of_wider_rows(used: list[str]) -> None:
    """Rows that do not lie behind one another, and one that is not a number, which spoils no other."""
    x = drawn(1, torch.float32, 4, 40)[:, 3:24]
    x[2, 5] = torch.nan
    targets = torch.tensor([0, 20, 1, 4])
    (by,) = torch.autograd.grad(Whole().entropy(leaf := x.clone().requires_grad_(), targets, 0.0, 0.0).nll, leaf)
    assert by[2].isnan().all() and not by[[0, 1, 3]].isnan().any()
    assert Whole().entropy(x, targets, 0.0, 0.0).nll.isnan()
    good = torch.tensor([0, 1, 3])
    expected = F.cross_entropy(x[good].double(), targets[good], reduction="sum")
    wide = Whole().entropy(x, targets.where(targets != 1, -1), 0.0, 0.0).nll
    near(wide, expected, torch.float32, 8.0)
    assert used[-1] == "entropy"


@pytest.mark.parametrize("wrong", [[0, 5], [-2, 0]])
def test_targets_that_no_logit_stands_for_are_refused(wrong: list[int]) -> None:
    with pytest.raises(IndexError, match="of 5 logits"):
        Whole().entropy(drawn(0, torch.float32, 2, 5), torch.tensor(wrong), 0.0, 0.0)


def test_smoothing_and_z_are_torchs(used: list[str]) -> None:
    x, targets = drawn(3, torch.bfloat16, 3, 9), torch.tensor([1, -1, 8])
    found = Whole().entropy(x, targets, 0.1, 0.01)
    smooth = F.cross_entropy(x.double(), targets, ignore_index=-1, reduction="sum", label_smoothing=0.1)
    z = 0.01 * (x.double().logsumexp(-1).square() * (targets >= 0)).sum()
    near(found.objective, smooth + z, torch.float32, 8.0)
    assert used == []


@pytest.mark.parametrize("dtype", DTYPES)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), taps=st.integers(2, 5), biased=st.booleans())
def test_short_convolutions(dtype: torch.dtype, lengths: list[int], taps: int, biased: bool) -> None:
    """Document by document, as torch's of each alone."""
    seq = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)])
    made = lanes(training_step(torch.zeros_like(seq), seq, seq * 0, (1, len(seq)), 9), keeps=False)
    given_ = [drawn(1, dtype, 1, len(seq), 19), drawn(2, dtype, 19, taps), *([drawn(3, dtype, 19)] if biased else [])]
    upstream = drawn(4, dtype, 1, len(seq), 19)
    ours, exact = ([t.clone().requires_grad_() for t in some] for some in (given_, [t.double() for t in given_]))
    y, _ = short_conv(ours[0], ours[1], ours[2] if biased else None, torch.zeros(1, taps - 1, 19, dtype=dtype), made)
    own = [F.pad(exact[0][0, seq == b].T[None], (taps - 1, 0)) for b in range(len(lengths))]
    bias = exact[2] if biased else None
    expected = torch.cat([F.conv1d(x, exact[1][:, None], bias, groups=19)[0].T for x in own])[None]
    assert y.dtype == dtype
    near(y.detach(), expected.detach(), dtype)
    found = torch.autograd.grad(y, ours, upstream)
    for mine, theirs in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert mine.dtype == dtype
        near(mine, theirs, dtype, 2.0 if dtype is torch.bfloat16 else 16.0)  # sums over all tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 7), (64, 16), (65, 17), (130, 64)])
@pytest.mark.parametrize("shift", [None, 0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, rows: int, size: int, shift: float | None, used: list[str]) -> None:
    """Without a weight, with one, and with one beside 1; rows of a wider matrix."""
    x, upstream = drawn(7, dtype, rows, size + 3)[:, 2 : size + 2], drawn(8, dtype, rows, size)
    given_ = [x, *([] if shift is None else [drawn(9, dtype, size)])]
    ours, exact = (
        [t.detach().clone().requires_grad_() for t in some] for some in (given_, [t.double() for t in given_])
    )
    y = rms_norm(ours[0], ours[1] if len(ours) > 1 else None, 1e-3, shift or 0.0)
    expected = F.rms_norm(exact[0], (size,), None if shift is None else exact[1] + shift, 1e-3)
    assert y.dtype == dtype
    several = 2.0 if dtype is torch.bfloat16 else 5.0  # of the mean, its root, what divides by it, and two products
    near(y.detach(), expected.detach(), dtype, several)
    found = torch.autograd.grad(y, ours, upstream)
    for mine, theirs in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert mine.dtype == dtype
        near(mine, theirs, dtype, 2.0 if dtype is torch.bfloat16 else 16.0)
    near(rms_norm(x, None, 1e-3), F.rms_norm(x.double(), (size,), None, 1e-3), dtype, several)
    assert used == ["norms", "rms_norm", "rms_norm_back", "rms_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_length(dtype: torch.dtype) -> None:
    """Of queries and keys, in float32 whatever they came in."""
    x, upstream = drawn(10, dtype, 2, 3, 4, 5), drawn(11, torch.float32, 2, 3, 4, 5)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = unit(ours, 1e-6, 0.5), 0.5 * exact / (exact.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert y.dtype == torch.float32
    near(y.detach(), expected.detach(), torch.float32)
    (mine,), (theirs,) = torch.autograd.grad(y, ours, upstream), torch.autograd.grad(expected, exact, upstream.double())
    near(mine, theirs, dtype, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "dim"), [(3, 8, None), (2, 16, None), (1, 34, None), (2, 40, 24)])
def test_rope(dtype: torch.dtype, heads: int, size: int, dim: int | None, used: list[str]) -> None:
    """Its gradient turns the other way. Angles of float32, rounded once with the result."""
    spec, places = Rope(dim=dim), torch.tensor([0, 1, 5, 900, 3])
    x = drawn(5, dtype, 5, heads, size)
    upstream = drawn(6, dtype, 5, heads, size)
    exact = turns(spec, places, size, torch.tensor([1000]))
    low = type(exact)(*(t.float() for t in exact))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    (cos, sin), half = (t.double() for t in low), low.sin.shape[-1]
    first, second, rest = theirs.split([half, half, size - 2 * half], -1)
    cos = cos[..., :half]
    y, expected = turn(ours, low), torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
    near(y.detach(), expected.detach(), dtype)
    (mine,), (exactly,) = (
        torch.autograd.grad(y, ours, upstream),
        torch.autograd.grad(expected, theirs, upstream.double()),
    )
    near(mine, exactly, dtype)
    assert used == ["turn", "turn"]
