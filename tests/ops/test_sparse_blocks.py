"""Blocks of keys: where they stand, what they are worth, and which are chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.ops.attend import Blocks, attend, best, entered, looked_into, narrowed, plan, runs
from assay.ops.sees import Sees
from assay.ops.step import Layout, View, rows_step
from tests.ops.cases import problem

CAUSAL = Sees()


def packed(rows: list[list[int]]) -> Layout:
    """Documents of these lengths in each row, the shorter rows filled up with empty entries."""
    width = max(sum(row) for row in rows)
    seq, index = torch.full((len(rows), width), -1), torch.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        at = 0
        for d, length in enumerate(row):
            seq[r, at : at + length], index[r, at : at + length] = 10 * r + d, torch.arange(length)
            at += length
    return Layout(seq, index, index, True)


documents = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


@given(documents, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_runs_are_the_whole_blocks_of_each_document(rows: list[list[int]], stride: int, times: int, flat: bool) -> None:
    layout, size = packed(rows), stride * times
    found = runs(layout, 1 if flat else len(rows), size, stride)
    wanted = {
        (10 * r + d, start)
        for r, row in enumerate(rows)
        for d, n in enumerate(row)
        for start in range(0, n - size + 1, stride)
    }
    seq, index = layout.seq.view(found.first.shape[0], -1), layout.index.view(found.first.shape[0], -1)
    told = []
    for r, c in found.real.nonzero().tolist():
        first = int(found.first[r, c])
        told.append((int(found.seq[r, c]), int(index[r, first])))
        assert (seq[r, first : first + size] == found.seq[r, c]).all()
        assert index[r, first : first + size].tolist() == list(range(told[-1][1], told[-1][1] + size))
        assert int(found.end[r, c]) == told[-1][1] + size - 1
    assert len(told) == len(set(told)) and set(told) == wanted


@given(documents, st.integers(1, 4))
def test_picked_blocks_are_spread_over_their_entries(rows: list[list[int]], size: int) -> None:
    layout = packed(rows)
    found, entries = runs(layout, len(rows), size, size), layout.seq.shape[1]
    picked = torch.rand(len(rows), 2, 3, found.first.shape[1], generator=torch.Generator().manual_seed(0)) < 0.5
    picked &= found.real[:, None, None]
    table = torch.zeros(len(rows), 2, 3, entries, dtype=torch.bool)
    for r, g, t, c in picked.nonzero().tolist():
        table[r, g, t, int(found.first[r, c]) : int(found.first[r, c]) + size] = True
    assert torch.equal(found.spread(picked, entries), table)


def test_no_key_exceeds_the_bound_of_its_page() -> None:
    """10 000 pairs of a query and a page: q k <= the bound for every key (2406.10774, section 3.3)."""
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(1, 100, 1, 6, generator=draw, dtype=torch.float64)
    keys = torch.randn(1, 100, 5, 1, 6, generator=draw, dtype=torch.float64)
    bound = Blocks(by="bounds", size=5).worth(q, keys)[0, 0]
    low, high = keys[0, :, :, 0].amin(1), keys[0, :, :, 0].amax(1)
    each = torch.maximum(q[0, :, 0, None] * low, q[0, :, 0, None] * high)
    torch.testing.assert_close(bound, each.sum(-1))
    products = torch.einsum("tk,cbk->tcb", q[0, :, 0], keys[0, :, :, 0])
    assert bound.shape == (100, 100) and (products.amax(-1) <= bound + 1e-12).all()


@pytest.mark.parametrize("by", ["mean", "bounds"])
def test_the_order_inside_a_page_does_not_matter(by: str) -> None:
    draw = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, 4, 6, generator=draw, dtype=torch.float64)
    keys = torch.randn(2, 7, 8, 2, 6, generator=draw, dtype=torch.float64)
    rule, can = Blocks.model_validate({"by": by, "size": 8}), torch.ones(2, 3, 7, dtype=torch.bool)
    mixed = keys[:, :, torch.randperm(8, generator=draw)]
    a, b = rule.worth(q, keys), rule.worth(q, mixed)
    torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    assert by == "mean" or torch.equal(a, b)
    assert torch.equal(best(a, can, 3), best(b, can, 3))


def test_a_mean_is_the_mean_of_the_products() -> None:
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(1, 3, 4, 6, generator=draw, dtype=torch.float64)
    keys = torch.randn(1, 5, 2, 2, 6, generator=draw, dtype=torch.float64)
    each = torch.einsum("rthk,rcbhk->rhtcb", q, keys.repeat_interleave(2, 3))
    torch.testing.assert_close(Blocks(size=2).worth(q, keys), each.mean(-1))


def test_of_equal_blocks_the_earliest_and_never_one_that_cannot_be() -> None:
    worth = torch.tensor([[[[1.0, 2.0, 2.0, 9.0, 2.0]]]])
    can = torch.tensor([[[True, True, True, False, True]]])
    assert best(worth, can, 2).flatten().tolist() == [False, True, True, False, False]
    assert best(worth, can, 9).flatten().tolist() == can.flatten().tolist()
    assert not best(worth, can, 0).any()


def test_a_planted_block_is_found_by_each_head() -> None:
    """Head h of the last token is told which block is its own choice."""
    k = torch.zeros(1, 17, 2, 4, dtype=torch.float64)
    k[0, 4:8, 0, 0], k[0, 12:16, 1, 1], k[0, 0:4, 1, 2] = 1.0, 1.0, 1.0
    q = torch.zeros(17, 2, 4, dtype=torch.float64)
    q[16, 0, 0], q[16, 1, 2] = 5.0, 5.0
    step = rows_step(torch.zeros(1, 17, dtype=torch.long))
    layout = Layout(step.seq[None], step.index[None], step.positions[None], True)
    view = View({"k": k, "v": k}, layout)
    for by in ("mean", "bounds"):
        made = looked_into(Blocks.model_validate({"by": by, "size": 4, "keep": 2}), None, q, view, step, CAUSAL)
        assert made is not None and made.mask is not None
        assert made.mask[0, 0, 16].nonzero().flatten().tolist() == [4, 5, 6, 7, 16]
        assert made.mask[0, 1, 16].nonzero().flatten().tolist() == [0, 1, 2, 3, 16]


@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
def test_a_mask_for_each_group_is_attention_under_it(backend: str) -> None:
    p = problem(tokens=9, heads=4, groups=2)
    made = p.plan(backend)
    assert made.mask is not None
    draw = torch.rand(2, 2, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = (draw | torch.eye(9, dtype=torch.bool)) & made.mask[:, None]
    out = attend(p.q, p.view, p.step, p.sees, p.scores, narrowed(made, mask))
    q, k, v = (t.view(2, 9, -1, t.shape[-1]).transpose(1, 2) for t in (p.q, p.k, p.v))
    for h in range(4):
        z = (q[:, h] @ k[:, h // 2].mT * p.scores.scale).masked_fill(~mask[:, h // 2], float("-inf"))
        torch.testing.assert_close(out.view(2, 9, 4, -1)[:, :, h], z.softmax(-1) @ v[:, h // 2], atol=1e-12, rtol=0)


def test_a_backend_that_makes_its_own_mask_is_refused() -> None:
    p = problem(tokens=9)
    for backend in ("oracle", "tiled"):
        with pytest.raises(ValueError, match=f"{backend!r} does not read a chosen mask; accepted: auto, matmul, sdpa"):
            looked_into(Blocks(size=2, keep=2), plan(p.step, p.layout, CAUSAL, backend), p.q, p.view, p.step, CAUSAL)


def test_the_own_block_is_of_the_own_document() -> None:
    layout = packed([[3, 5]])
    step = rows_step(torch.zeros(1, 8, dtype=torch.long))
    step = step.with_(seq=layout.seq.view(-1), index=layout.index.view(-1), positions=layout.index.view(-1))
    found = runs(layout, 1, 2, 2)
    seen = entered(found, torch.zeros(1, 1, 8, found.first.shape[1], dtype=torch.bool), step, layout)[0, 0]
    groups = [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5, 6], [5, 6], [7]]
    assert [row.nonzero().flatten().tolist() for row in seen] == groups
