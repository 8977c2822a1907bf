"""Every backend against the oracle, and the oracle against the formula and against closed cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from assay.ops.attend import Scores, attend, attend_lse, executed_pairs, merge, plan
from assay.ops.attend.plan import query_blocks
from assay.ops.sees import Sees
from assay.ops.step import rows_step
from tests.ops.cases import RULES, Line, Problem, Slopes, problem, problems

FAST = ("matmul", "tiled")


def close(a: torch.Tensor, b: torch.Tensor, error: float) -> None:
    torch.testing.assert_close(a, b, atol=error, rtol=error)


def visible(p: Problem, place: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask [T, S] of whole rows: both in the prefix, or what the rule says without one."""
    assert p.step.prefix is not None
    seen = p.sees.visible(place, key)
    return seen | ((place < p.step.prefix[0]) & (key < p.step.prefix[0])) if p.sees.prefix else seen


def naive(p: Problem) -> torch.Tensor:
    """softmax(q k^T * scale) v over whole rows, with heads repeated for the groups."""
    rows, heads = p.k.shape[0], p.q.shape[1]
    q = p.q.view(rows, -1, heads, p.q.shape[-1]).transpose(1, 2)
    k, v = (t.repeat_interleave(heads // t.shape[2], 2).transpose(1, 2) for t in (p.k, p.v))
    place, key = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2], torch.arange(k.shape[2])
    z = (q @ k.transpose(-1, -2) * p.scores.scale).masked_fill(~visible(p, place, key), -math.inf)
    return (z.softmax(-1) @ v).transpose(1, 2).reshape(*p.q.shape[:2], -1)


@pytest.mark.parametrize("sees", (*RULES[:6], RULES[-1]), ids=str)
@pytest.mark.parametrize("backend", ["oracle", "matmul", "tiled", "sdpa"])
def test_backends_equal_the_formula(backend: str, sees: Sees) -> None:
    p = problem(tokens=9, past=2, sees=sees)
    close(p.run(backend), naive(p), 1e-12)


@given(problems())
def test_backends_equal_the_oracle(p: Problem) -> None:
    expected = p.run("oracle")
    assert expected.isfinite().all()
    for backend in FAST:
        close(p.run(backend), expected, 1e-11)


@given(problems(softcap=None, with_sink=False, with_bias=None))
def test_sdpa_equals_the_oracle(p: Problem) -> None:
    close(p.run("sdpa"), p.run("oracle"), 1e-11)


@given(problems(), st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]))
def test_low_precision_stays_near_the_oracle(p: Problem, kind: tuple[torch.dtype, float]) -> None:
    # bfloat16 keeps 8 bits: the inputs are rounded first, so what is left is the rounding of the output.
    dtype, error = kind
    p = p.to(dtype)
    for backend in FAST:
        out = p.run(backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), p.to(torch.float64).run("oracle"), atol=error, rtol=error)


@pytest.mark.parametrize("sees", RULES, ids=str)
@pytest.mark.parametrize("tokens,past", [(256, 0), (300, 40), (520, 0)])
def test_blocks_of_queries_equal_the_square(sees: Sees, tokens: int, past: int) -> None:
    p = problem(rows=2, tokens=tokens, past=past, heads=2, groups=1, sees=sees)
    assert len(p.plan("matmul").blocks) == len(query_blocks(tokens)) > 1
    close(p.run("matmul"), naive(p), 1e-11)
    close(p.run("tiled"), naive(p), 1e-11)


def test_packed_rows_in_blocks_equal_separate_documents() -> None:
    p = problem(rows=2, tokens=270, packed=True)
    close(p.run("matmul"), p.run("sdpa"), 1e-11)
    cut = 135
    alone = problem(rows=1, tokens=cut)
    alone = replace(alone, q=p.q[:cut], k=p.k[:1, :cut], v=p.v[:1, :cut])
    close(p.run("matmul")[:cut], naive(alone), 1e-11)


@pytest.mark.parametrize("backend", ["oracle", "matmul", "tiled", "sdpa"])
def test_a_token_that_sees_nothing_gives_zero(backend: str) -> None:
    p = problem(blank=2)
    upstream = torch.ones(p.q.shape, dtype=torch.float64)
    out = p.run(backend)
    # Token 1 is padding, and the first two entries are empty: tokens 0 and 1 of both rows see nothing.
    assert (out.view(2, 7, -1)[:, :2] == 0).all() and (out.view(2, 7, -1)[:, 2:] != 0).all()
    for g in p.gradients(backend, upstream):
        assert g.isfinite().all()


@pytest.mark.parametrize("backend", ["oracle", "matmul", "tiled", "sdpa"])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_stay_finite(backend: str, size: float) -> None:
    p = problem(scale=1.0).to(torch.float32)
    p = replace(p, q=torch.full_like(p.q, 1.0), k=p.k.sign() * size)
    assert p.run(backend).isfinite().all()
    assert all(g.isfinite().all() for g in p.gradients(backend, torch.ones_like(p.q)))


def test_one_head_a_group_is_plain_multi_head_attention_bit_for_bit() -> None:
    mha = problem(heads=4, groups=4, tokens=300)
    for backend in (*FAST, "sdpa"):
        for h in range(4):
            one = replace(mha, q=mha.q[:, h : h + 1].contiguous(), k=mha.k[:, :, h : h + 1], v=mha.v[:, :, h : h + 1])
            close(one.run(backend), mha.run(backend)[:, h : h + 1], 1e-13)
    grouped = problem(heads=4, groups=2)
    repeated = replace(grouped, k=grouped.k.repeat_interleave(2, 2), v=grouped.v.repeat_interleave(2, 2))
    for backend in ("oracle", *FAST, "sdpa"):
        close(grouped.run(backend), repeated.run(backend), 1e-13)
    assert torch.equal(grouped.run("oracle"), repeated.run("oracle"))


def test_the_grouped_and_the_multi_head_layout_are_the_same_bits() -> None:
    from assay.ops.attend.matmul import heads_first

    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(heads_first(x, 4), x.unflatten(2, (4, 1)).permute(0, 2, 3, 1, 4).reshape(8, 5, 3))


@given(st.floats(0.5, 50), st.floats(-200, 200))
def test_softcap_bounds_and_keeps_order(cap: float, z: float) -> None:
    rule = Scores(1.0, softcap=cap)
    points = torch.tensor([0.0, z, z + 1.0], dtype=torch.float64, requires_grad=True)
    out = rule.capped(points)
    assert (out.abs() <= cap).all() and out[2] >= out[1]
    assert torch.autograd.grad(out[0], points)[0][0] == 1.0


@pytest.mark.parametrize("backend", ["oracle", "matmul", "tiled"])
def test_a_sink_is_a_key_of_value_zero(backend: str) -> None:
    p = problem(groups=4, with_sink=True, sees=Sees(causal=False))
    assert p.scores.sink is not None
    z = torch.einsum("rthk,rshk->rhts", p.q.view(2, 7, 4, 3), p.k) * p.scores.scale
    z = torch.cat([z, p.scores.sink.view(1, 4, 1, 1).expand(2, 4, 7, 1)], -1)
    v = torch.cat([p.v, torch.zeros(2, 1, 4, 3, dtype=torch.float64)], 1)
    close(p.run(backend), torch.einsum("rhts,rshk->rthk", z.softmax(-1), v).reshape(14, 4, 3), 1e-12)
    silent = replace(p, scores=replace(p.scores, sink=torch.full((4,), -math.inf)))
    close(silent.run(backend), replace(p, scores=replace(p.scores, sink=None)).run(backend), 1e-14)


@given(problems(rows=1, packed=False, blank=0, tokens=1, past=11, with_bias=None), st.randoms())
def test_merge_in_any_order(p: Problem, random: object) -> None:
    p = replace(p, sees=Sees())
    cuts = [(0, 4), (4, 4), (4, 9), (9, 12)]
    parts = []
    for i, (a, b) in enumerate(cuts):
        layout = replace(p.layout, **{n: getattr(p.layout, n)[:, a:b] for n in ("seq", "index", "positions")})
        scores = p.scores if i == 2 else replace(p.scores, sink=None)
        part = replace(p, k=p.k[:, a:b], v=p.v[:, a:b], layout=layout, scores=scores)
        backend = ("oracle", "matmul", "tiled", "matmul")[i]
        parts.append(attend_lse(part.q, part.view, part.step, part.sees, part.scores, part.plan(backend)))
    expected = attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan("oracle"))
    assert all(torch.equal(x, y) for x, y in zip(merge(*parts[:2]), merge(*parts[1::-1])))
    while len(parts) > 1:
        i = random.randrange(len(parts) - 1)  # type: ignore[attr-defined]
        j = random.randrange(i + 1, len(parts))  # type: ignore[attr-defined]
        b, a = parts.pop(j), parts.pop(i)
        parts.append(merge(a, b))
    for got, want in zip(parts[0], expected):
        close(got, want, 1e-12)


@given(problems(), st.sampled_from(FAST))
def test_the_log_sum_exp_is_the_oracle_s(p: Problem, backend: str) -> None:
    args = (p.q, p.view, p.step, p.sees, p.scores)
    for got, want in zip(attend_lse(*args, p.plan(backend)), attend_lse(*args, p.plan("oracle"))):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("sees", RULES, ids=str)
@pytest.mark.parametrize("new,past", [(1, 0), (7, 0), (1, 9), (130, 0), (260, 0), (300, 21), (520, 0)])
def test_executed_pairs_are_what_torch_counts(sees: Sees, new: int, past: int) -> None:
    half = (new + past) // 2
    p = problem(rows=2, tokens=new, past=past, heads=4, groups=2, sees=sees)
    with FlopCounterMode(display=False) as counter:
        p.run("matmul")
    assert counter.get_total_flops() == 2 * 4 * 4 * 3 * executed_pairs(new, past, sees, prefix=half)
    with FlopCounterMode(display=False) as counter:
        replace(p, scores=replace(p.scores, softcap=9.0)).run("matmul")
    assert counter.get_total_flops() == 2 * 4 * 4 * 3 * executed_pairs(new, past, sees, prefix=half)
    uneven = replace(p, scores=replace(p.scores, bias=Slopes(torch.ones(4))))  # does not say that it goes by distance
    with FlopCounterMode(display=False) as counter:
        uneven.run("matmul")
        p.run("tiled")
    assert counter.get_total_flops() == 2 * 4 * 4 * 3 * (
        new * (new + past) + executed_pairs(new, past, sees, "tiled", half)
    )


def test_what_cannot_be_served_is_refused_by_name() -> None:
    step = rows_step(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"'flash'; accepted: auto, oracle, tiled, matmul, sdpa"):
        plan(step, problem(rows=1, tokens=3).layout, Sees(), "flash")
    for more, name in (({"softcap": 2.0}, "softcap"), ({"with_sink": True}, "sink"), ({"with_bias": Slopes}, "bias")):
        with pytest.raises(ValueError, match=f"sdpa.*no {name}"):
            problem(**more).run("sdpa")
    p = problem()
    with pytest.raises(ValueError, match="log-sum-exp"):
        attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan("sdpa"))
    learned = problem(with_bias=Line)
    learned.leaves()
    with pytest.raises(ValueError, match=r"tiled.*bias"):
        learned.run("tiled")
    with pytest.raises(ValueError, match=r"sdpa.*accepted: oracle, tiled, matmul"):
        executed_pairs(4, 0, Sees(), "sdpa")


def test_auto_takes_what_serves() -> None:
    p = problem(softcap=2.0, with_sink=True, with_bias=Slopes)
    close(attend(p.q, p.view, p.step, p.sees, p.scores), p.run("oracle"), 1e-12)
