"""Compiled attention of many queries a row against the softmax in float64: any rule, any sizes, any store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.ops.attend import Scores, attend, plan
from assay.ops.native import Kernels
from assay.ops.sees import Sees
from assay.ops.state import step_layout
from assay.ops.step import InPages, Layout, View, rows_step
from tests.ops.natives import DTYPES, ROUND, drawn

floats = st.sampled_from(DTYPES)
quick = settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.generate))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 2)),
        "tokens": draw(st.sampled_from((2, 5, 17, 64, 65, 131))),
        "past": draw(st.sampled_from((0, 0, 3, 64, 70))),
        "groups": draw(st.integers(1, 2)),
        "shared": draw(st.sampled_from((1, 2, 3, 7))),
        "size": draw(st.sampled_from((1, 8, 33, 64))),
        "width": draw(st.sampled_from((1, 24, 64, 80))),
        "softcap": draw(st.sampled_from((None, 3.0))),
        "sink": draw(st.booleans()),
        "rule": draw(
            st.sampled_from((Sees(), Sees(window=9), Sees(window=5, first=2), Sees(causal=False), Sees(chunk=6)))
        ),
    }


def exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float | None, sink: Tensor | None) -> Tensor:
    """[R * T, H, V] in float64."""
    rows, tokens, _ = seen.shape
    shared = q.shape[1] // k.shape[2]
    queries = q.double().view(rows, tokens, *q.shape[1:])
    z = torch.einsum("rthk,rshk->rhts", queries, k.double().repeat_interleave(shared, 2)) * 0.3
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    e = torch.where(seen[:, None], z.exp(), 0.0)
    whole = e.sum(-1, keepdim=True) + (0.0 if sink is None else sink.double().exp()[:, None, None])
    p = e / torch.where(whole > 0, whole, 1.0)
    return torch.einsum("rhts,rshv->rthv", p, v.double().repeat_interleave(shared, 2)).flatten(0, 1)


def drawn_problem(sizes: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    rows, tokens, groups = sizes["rows"], sizes["tokens"], sizes["groups"]
    entries, heads = sizes["past"] + tokens, groups * sizes["shared"]
    q = drawn(2, dtype, rows * tokens, heads, sizes["size"])
    k, v = (drawn(i, dtype, rows, entries + 3, groups, sizes[n])[:, :entries] for i, n in enumerate(("size", "width")))
    place = torch.arange(entries)
    seen = sizes["rule"].visible(place[sizes["past"] :, None], place).expand(rows, -1, -1).clone()
    seen[0, 0] = False  # padding
    return q, k, v, seen, drawn(5, dtype, heads) if sizes["sink"] else None


@given(problems(), floats)
@quick
def test_many_queries_are_the_softmax_in_float64_to_the_rounding(
    kernels: Kernels, sizes: dict[str, Any], dtype: torch.dtype
) -> None:
    q, k, v, seen, sink = drawn_problem(sizes, dtype)
    found = kernels.attend_tiled(q, (k, v), seen, 0.3, sizes["softcap"], sink)
    assert found is not None
    torch.testing.assert_close(
        found.double(), exact(q, k, v, seen, sizes["softcap"], sink), rtol=ROUND[dtype], atol=3e-6
    )


@given(problems(), floats, st.sampled_from((1, 3, 16)))
@quick
def test_a_querys_bits_depend_on_nothing_beside_it(
    kernels: Kernels, sizes: dict[str, Any], dtype: torch.dtype, page: int
) -> None:
    """Not on threads, on the other queries of the row, or on where its keys are stored."""
    q, k, v, seen, sink = drawn_problem(sizes, dtype)
    rows, tokens, entries = seen.shape
    rule = (0.3, sizes["softcap"], sink)
    torch.set_num_threads(3)
    try:
        whole = kernels.attend_tiled(q, (k, v), seen, *rule)
    finally:
        torch.set_num_threads(1)
    assert whole is not None
    last = kernels.attend_tiled(q.view(rows, tokens, *q.shape[1:])[:, -1], (k, v), seen[:, -1:], *rule)
    assert last is not None and torch.equal(last, whole.view(rows, tokens, *whole.shape[1:])[:, -1])
    pages = -(-entries // page)
    table = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(1)).view(rows, pages)
    pools = []
    for t in (k, v):
        padded = torch.zeros(rows, pages * page, *t.shape[2:], dtype=dtype)
        padded[:, :entries] = t
        pools.append(torch.empty(rows * pages, page, *t.shape[2:], dtype=dtype))
        pools[-1][table] = padded.view(rows, pages, page, *t.shape[2:])
    more = torch.zeros(rows, tokens, pages * page, dtype=torch.bool)
    more[..., :entries] = seen
    paged = kernels.attend_tiled(q, (pools[0], pools[1]), more, *rule, table)
    assert paged is not None and torch.equal(paged, whole)


def test_numbers_that_are_none_stay_none(kernels: Kernels) -> None:
    q, k, v = (drawn(i, torch.float32, *shape) for i, shape in enumerate(((70, 2, 16), (1, 70, 1, 16), (1, 70, 1, 16))))
    k[0, 9] = float("nan")
    found = kernels.attend_tiled(q, (k, v), torch.ones(70, 70, dtype=torch.bool).tril()[None], 0.2)
    assert found is not None and not found[:9].isnan().any() and found[9:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_takes_the_kernel_for_chunks_and_pages(used: list[str], dtype: torch.dtype) -> None:
    """Against the oracle, in inference; with gradients torch does the work."""
    rows, tokens, past = 2, 40, 24
    step = rows_step(torch.zeros(rows, tokens, dtype=torch.long), past)
    index = torch.arange(past + tokens).expand(rows, -1).contiguous()
    layout = Layout(torch.arange(rows)[:, None].expand(rows, past + tokens).contiguous(), index, index, True)
    q = drawn(0, dtype, rows * tokens, 4, 16)
    pools = {name: drawn(i, dtype, 2 * rows * 4, 16, 2, 16) for i, name in enumerate("kv")}
    view = View(InPages(pools, torch.randperm(16)[: rows * 4].view(rows, 4)), layout)
    sees, scores = Sees(window=30), Scores(0.25)
    with torch.inference_mode():
        found = attend(q, view, step, sees, scores, plan(step, layout, sees))
    assert used.count("attend_tiled") == 1
    dense = View({name: view.dense(name).double() for name in "kv"}, layout)
    expected = attend(q.double(), dense, step, sees, scores, plan(step, layout, sees, "oracle"))
    torch.testing.assert_close(found.double(), expected, rtol=ROUND[dtype], atol=3e-6)
    attend(q.requires_grad_(), view, step, sees, scores, plan(step, layout, sees))
    assert used.count("attend_tiled") == 1 and step_layout(step).aligned
