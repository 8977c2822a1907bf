"""Attention dropout against hand computations on the draw that a run reveals, against the oracle and in the mean."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from assay.ops.attend import api, attend, attend_lse
from assay.ops.sees import Sees
from tests.ops.cases import Problem, Slopes, problem, problems

RATE = 0.4
# The oracle goes token by token, so it is not asked for 270; sdpa has no soft cap and no sink.
PLAIN, FULL = (7, None, False), (270, 0.8, True)
CASES = [("oracle", *PLAIN), ("oracle", 7, 0.8, True), ("sdpa", *PLAIN), ("matmul", *PLAIN), ("matmul", *FULL)]


def seeded(p: Problem, backend: str, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return p.run(backend)


def without(p: Problem) -> Problem:
    return replace(p, scores=replace(p.scores, dropout=0.0))


def shown(p: Problem, backend: str) -> Tensor:
    """[R, T, H, S]: the probabilities as a run uses them: those that values of the identity matrix read out."""
    rows, entries, groups, _ = p.k.shape
    identity = torch.eye(entries, dtype=torch.float64)[None, :, None].expand(rows, entries, groups, entries)
    return seeded(replace(p, v=identity), backend).unflatten(0, (rows, -1))


def by_hand(p: Problem, kept: Tensor) -> Tensor:
    """Softmax, mask, 1 / (1 - p) and the values, for [R, T, H, S] kept."""
    rows, entries, groups, _ = p.k.shape
    heads = p.q.shape[1]
    k, v = (t.repeat_interleave(heads // groups, 2) for t in (p.k, p.v))
    z = torch.einsum("rthk,rshk->rths", p.q.unflatten(0, (rows, -1)), k) * p.scores.scale
    if p.scores.softcap is not None:
        z = p.scores.softcap * torch.tanh(z / p.scores.softcap)
    past = entries - z.shape[1]
    visible = p.sees.visible(torch.arange(z.shape[1])[:, None] + past, torch.arange(entries))
    z = z.masked_fill(~visible[:, None], -math.inf)
    if p.scores.sink is not None:
        z = torch.cat([z, p.scores.sink[None, None, :, None].expand(*z.shape[:3], 1)], -1)
    mix = z.softmax(-1)[..., :entries] * kept / (1 - RATE)
    return torch.einsum("rths,rshk->rthk", mix, v).flatten(0, 1)


@pytest.mark.parametrize("backend,tokens,softcap,sink", CASES)
def test_dropout_is_the_hand_computation(backend: str, tokens: int, softcap: float | None, sink: bool) -> None:
    p = problem(tokens=tokens, past=3, sees=Sees(window=150), softcap=softcap, with_sink=sink, dropout=RATE)
    used, full = shown(p, backend), shown(without(p), backend)
    kept = used != 0
    # A probability is left out or grows by 1 / (1 - p); one in p is left out.
    torch.testing.assert_close(used, torch.where(kept, full / (1 - RATE), 0.0), atol=1e-12, rtol=1e-12)
    seen = int((full != 0).sum())
    assert abs(int(kept.sum()) - seen * (1 - RATE)) < 5 * math.sqrt(seen * RATE * (1 - RATE))
    torch.testing.assert_close(seeded(p, backend), by_hand(p, kept), atol=1e-12, rtol=1e-12)
    upstream = torch.randn(p.q.shape, dtype=torch.float64)
    leaves = p.leaves()
    wanted = torch.autograd.grad((by_hand(p, kept) * upstream).sum(), leaves)
    torch.manual_seed(7)
    for got, want in zip(p.gradients(backend, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@given(problems(dropout=RATE))
def test_a_seed_leaves_out_the_same_whatever_the_backend(p: Problem) -> None:
    upstream = torch.randn(*p.q.shape[:2], p.v.shape[-1], dtype=torch.float64)
    found = []
    for backend in ("matmul", "oracle"):
        out = seeded(p, backend)
        torch.manual_seed(7)
        found.append((out, *p.gradients(backend, upstream)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
def test_the_mean_over_many_draws_is_attention_without(backend: str) -> None:
    one = problem(rows=1, tokens=5, dropout=RATE)
    rows = 8000
    many = problem(rows=rows, tokens=5, dropout=RATE)
    q = one.q.repeat(rows, 1, 1)
    k, v = (t.expand(rows, *t.shape[1:]) for t in (one.k, one.v))
    draws = seeded(replace(many, q=q, k=k, v=v), backend).view(rows, *one.q.shape)
    error = draws.std(0) / math.sqrt(rows)
    assert ((draws.mean(0) - without(one).run("oracle")).abs() < 5 * error).all() and (error > 0).all()


def test_the_log_sum_exp_knows_no_dropout() -> None:
    p = problem(with_sink=True, dropout=RATE)
    args = (p.q, p.view, p.step, p.sees)
    for backend in ("oracle", "matmul"):
        _, lse = attend_lse(*args, p.scores, p.plan(backend))
        torch.testing.assert_close(lse, attend_lse(*args, without(p).scores, p.plan("oracle"))[1], atol=1e-12, rtol=0)


def test_none_draws_nothing_and_changes_no_bit() -> None:
    p = problem(tokens=300)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    out = p.run("matmul")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(out, replace(p, scores=replace(p.scores, dropout=0.0)).run("matmul"))


def test_tiled_refuses_by_name_and_auto_goes_round_it(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(dropout=RATE, with_bias=Slopes)
    with pytest.raises(ValueError, match=r"'tiled' refuses this layer: .*dropout"):
        p.run("tiled")
    monkeypatch.setattr(api, "LARGEST_MASK", 0)
    assert p.plan("auto").mask is None
    torch.manual_seed(7)
    out = attend(p.q, p.view, p.step, p.sees, p.scores, p.plan("auto"))
    torch.testing.assert_close(out, seeded(p, "oracle"), atol=1e-12, rtol=1e-12)
