"""Patterns that leave out most pairs, by their definitions: strided, fixed (1904.10509), global tokens (2004.05150)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from assay.ops.attend import executed_pairs
from assay.ops.attend.call import Call
from assay.ops.attend.tiled import run as tiled
from assay.ops.sees import Sees
from tests.ops.cases import Problem, problem

PATTERNS = (
    Sees(window=2, stride=3),
    Sees(window=4, stride=2),
    Sees(chunk=4, last=1),
    Sees(chunk=3, last=2),
    Sees(causal=False, band=(1, 2), first=2),
)


@st.composite
def patterns(draw: st.DrawFn) -> Sees:
    kind, n = draw(st.sampled_from(["strided", "fixed", "global"])), draw(st.integers(2, 7))
    if kind == "strided":
        return Sees(window=draw(st.integers(1, 9)), stride=n)
    if kind == "fixed":
        return Sees(chunk=n, last=draw(st.integers(1, n - 1)))
    return Sees(causal=False, band=(draw(st.integers(0, 4)), draw(st.integers(0, 4))), first=draw(st.integers(0, 5)))


def mask(rule: Sees, new: int, past: int) -> np.ndarray:
    """As the papers say it, one pair at a time."""
    table = np.zeros((new, past + new), dtype=bool)
    for row in range(new):
        i = past + row
        for j in range(past + new):
            if rule.stride is not None:
                assert rule.window is not None
                table[row, j] = j <= i and (i - j < rule.window or (i - j) % rule.stride == 0)
            elif rule.chunk is not None:
                ends = {c * rule.chunk - n for c in range(1, i + 2) for n in range(1, rule.last + 1)}
                table[row, j] = j <= i and (j // rule.chunk == i // rule.chunk or j in ends)
            else:
                assert rule.band is not None
                table[row, j] = i - rule.band[0] <= j <= i + rule.band[1] or i < rule.first or j < rule.first
    return table


@given(patterns(), st.integers(1, 14), st.integers(0, 12))
def test_what_is_seen_and_counted(rule: Sees, new: int, past: int) -> None:
    past = past if rule.causal else 0
    table = mask(rule, new, past)
    q, k = np.arange(past, past + new), np.arange(past + new)
    assert (rule.visible(q[:, None], k) == table).all()
    assert rule.pairs(new, past) == table.sum()
    low, _ = rule.spans(q, past + new)
    assert (rule.lowest(q, low) == table.argmax(1)).all()
    assert rule.keep is None or rule.band is not None


def test_the_papers_own_sizes_grow_as_the_root() -> None:
    """Both patterns with blocks of sqrt N: the sums in closed form, and less than 2 N sqrt N of N^2 / 2."""
    for root in (8, 32, 64):
        n = root * root
        strided, fixed = Sees(window=root, stride=root), Sees(chunk=root, last=2)
        near = root * n - root * (root - 1) // 2
        assert strided.pairs(n, 0) == near + root * root * (root - 1) // 2
        assert fixed.pairs(n, 0) == root * root * (root + 1) // 2 + 2 * root * root * (root - 1) // 2
        assert max(strided.pairs(n, 0), fixed.pairs(n, 0)) < 2 * n * root


def dense(p: Problem) -> torch.Tensor:
    """softmax over the pairs of the definition, heads repeated for their groups."""
    rows, heads = p.k.shape[0], p.q.shape[1]
    q = p.q.view(rows, -1, heads, p.q.shape[-1]).transpose(1, 2)
    k, v = (t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2) for t in (p.k, p.v))
    seen = torch.from_numpy(mask(p.sees, q.shape[2], k.shape[2] - q.shape[2]))
    z = (q @ k.transpose(-1, -2) * p.scores.scale).masked_fill(~seen, float("-inf"))
    return (z.softmax(-1) @ v).transpose(1, 2).reshape(*p.q.shape[:2], -1)


@pytest.mark.parametrize("sees", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", ["oracle", "matmul", "tiled", "sdpa"])
def test_backends_are_dense_attention_with_the_mask(backend: str, sees: Sees) -> None:
    p = problem(tokens=11, past=3 if sees.causal else 0, sees=sees)
    torch.testing.assert_close(p.run(backend), dense(p), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("sees", PATTERNS, ids=str)
def test_small_tiles_and_packed_documents(sees: Sees) -> None:
    p = problem(tokens=13, sees=sees, packed=True)
    expected, upstream = p.run("oracle"), torch.randn(26, 4, 3, dtype=torch.float64)
    q = p.q.view(2, 13, *p.q.shape[1:])
    made = tiled(Call(q, p.k, p.v, p.step, p.view, sees, p.scores, p.plan("tiled")), 3, 2)[0]
    torch.testing.assert_close(made.flatten(0, 1), expected, atol=1e-12, rtol=1e-12)
    wanted = p.gradients("oracle", upstream)
    for backend in ("matmul", "tiled"):
        for a, b in zip(p.gradients(backend, upstream), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    "sees",
    [Sees(window=9, stride=50), Sees(chunk=90, last=7), Sees(causal=False, band=(20, 9), first=3)],
    ids=str,
)
@pytest.mark.parametrize("backend", ["matmul", "tiled"])
def test_executed_pairs_are_what_torch_counts(backend: str, sees: Sees) -> None:
    for new, past in ((300, 0), (140, 70)) if sees.causal else ((300, 0),):
        p = problem(rows=1, tokens=new, past=past, sees=sees)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            p.run(backend)
        assert counter.get_total_flops() == 4 * 4 * 3 * executed_pairs(new, past, sees, backend)


@pytest.mark.parametrize(
    ("wide", "plain"),
    [
        ({"window": 12, "stride": 5}, {}),
        ({"window": 1, "stride": 2}, None),
        ({"chunk": 12, "last": 3}, {}),
        ({"chunk": 4, "last": 3}, None),
        ({"causal": False, "band": (1, 0), "first": 11}, {"causal": False}),
    ],
)
def test_wide_enough_is_full_attention(wide: dict[str, Any], plain: dict[str, Any] | None) -> None:
    """And not wide enough is not."""
    p = problem(tokens=12, sees=Sees(**wide))
    full = problem(tokens=12, sees=Sees(**(plain or {}))).run("matmul")
    assert torch.allclose(p.run("matmul"), full, atol=1e-12) == (plain is not None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 3}, "`stride` shows keys behind a `window`"),
        ({"window": 3, "stride": 3, "first": 1}, "not combined with `chunk` or `first`"),
        ({"last": 1}, "`last` .* needs `chunk`"),
        ({"chunk": 4, "last": 1, "window": 2}, "no `window`"),
        ({"chunk": 4, "last": 4}, "`last` is 4; accepted: 0 to 3"),
        ({"first": 2, "causal": False}, "behind a `window` or a `band`"),
        ({"window": 3, "stride": 1}, "stride"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sees(**fields)


def test_two_rules_of_which_one_is_scattered_have_no_single_form() -> None:
    rule = Sees(chunk=4, last=1)
    assert rule & rule == rule
    with pytest.raises(ValueError, match="`stride` or `last`"):
        rule & Sees()
