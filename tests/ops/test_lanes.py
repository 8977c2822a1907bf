"""Lanes: every token of a step at its time, and short convolutions over them, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.conv import short_conv
from assay.ops.lanes import lanes
from assay.ops.step import Step, training_step

C = 3


def flat_step(past: list[int], new: list[int], padding: int, order: list[int]) -> Step:
    """Sequences on one axis in `order`, each bringing new[b] tokens after past[b]; then padding."""
    seq = [b for b in order for _ in range(new[b])] + [-1] * padding
    index = [past[b] + i for b in order for i in range(new[b])] + [0] * padding
    n, at = len(seq), torch.tensor
    last = [max(i for i, s in enumerate(seq) if s == b) for b in range(len(past))]
    step = training_step(torch.zeros(n, dtype=torch.long), at(seq), at(index), (1, n), 99)
    before = at(past)
    return step.with_(grid=None, past=before, horizon=before + 99, longest=max(new), saves=at(last))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    new = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    past = [draw(st.integers(0, 3)) for _ in new]
    return flat_step(past, new, draw(st.integers(0, 3)), draw(st.permutations(range(len(new)))))


@given(step=steps())
def test_each_sequence_is_a_lane(step: Step) -> None:
    made, x = lanes(step, keeps=True), drawn(step.tokens, C)
    laid = made.lay(x)
    assert laid.shape == (step.past.shape[0], step.longest, C)
    for b in range(made.count):
        own = x[step.seq == b]
        assert torch.equal(laid[b, : len(own)], own) and not laid[b, len(own) :].any()
        assert made.filled is None or int(made.filled[b]) == len(own)
    assert torch.equal(made.flat(laid), torch.where(step.seq[:, None] >= 0, x, 0.0))


@given(step=steps(), taps=st.integers(2, 4))
def test_a_convolution_goes_on_where_the_sequence_stopped(step: Step, taps: int) -> None:
    """Each sequence alone through torch's convolution, with what came before on its left."""
    made, x, past = lanes(step, keeps=True), drawn(step.tokens, C), drawn(step.past.shape[0], taps - 1, C)
    weight, bias = drawn(C, taps), drawn(C)
    y, tail = short_conv(made.lay(x), weight, bias, past, made)
    y = made.flat(y)
    for b in range(made.count):
        whole = torch.cat([past[b], x[step.seq == b]])
        expected = F.conv1d(whole.T[None], weight[:, None], bias, groups=C)[0].T
        assert torch.allclose(y[step.seq == b], expected, rtol=0, atol=1e-12)
        assert torch.equal(tail[b], whole[len(whole) - taps + 1 :])
    assert torch.equal(made.ends(tail, step), tail)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), taps=st.integers(2, 6), padding=st.integers(0, 2))
def test_documents_of_a_row_do_not_touch(lengths: list[int], taps: int, padding: int) -> None:
    seq = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)] + [-1] * padding)
    x, weight = drawn(len(seq), C), drawn(C, taps)
    step = training_step(torch.zeros_like(seq), seq, seq * 0, (1, len(seq)), 9)
    made = lanes(step, keeps=False)
    y = made.flat(short_conv(made.lay(x), weight, None, torch.zeros(1, taps - 1, C).double(), made)[0])
    for b in range(len(lengths)):
        own = F.pad(x[seq == b].T[None], (taps - 1, 0))
        assert torch.allclose(y[seq == b], F.conv1d(own, weight[:, None], groups=C)[0].T, rtol=0, atol=1e-12)
    fresh = made.fresh()
    assert fresh is not None and int(fresh.sum()) == len(lengths) - 1 + (padding > 0)


def test_states_between_are_not_silently_missing() -> None:
    step = flat_step([0], [3], 0, [0]).with_(saves=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="2 tokens of 1 sequences; accepted: the last token of each"):
        lanes(step, keeps=True).ends(torch.zeros(1, 2), step)
