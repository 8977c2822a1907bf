"""Hand-written backward passes against autograd through the oracle, and what they keep in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from assay.ops.attend import attend, attend_lse
from assay.ops.attend.call import Call
from assay.ops.attend.tiled import Traffic, naive_traffic
from assay.ops.attend.tiled import run as run_tiled
from assay.ops.sees import Sees
from tests.ops.cases import RULES, Line, Problem, problem, problems


def agree(p: Problem, backend: str, reference: str = "oracle", error: float = 1e-10) -> None:
    upstream = torch.randn(p.run(backend).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, want in zip(p.gradients(backend, upstream), p.gradients(reference, upstream)):
        torch.testing.assert_close(got, want, atol=error, rtol=error)


@given(problems())
def test_matmul_backward_is_the_oracle_s(p: Problem) -> None:
    agree(p, "matmul")


@given(problems(with_bias=None))
def test_tiled_backward_is_the_oracle_s(p: Problem) -> None:
    agree(p, "tiled")


@given(problems(softcap=None, with_sink=False, with_bias=None))
def test_sdpa_backward_is_the_oracle_s(p: Problem) -> None:
    agree(p, "sdpa")


@pytest.mark.parametrize("sees", RULES, ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"with_sink": True, "with_bias": Line, "softcap": 0.7}, {"packed": True, "softcap": 0.7}, {"groups": 1}],
    ids=str,
)
def test_blocked_backward_is_the_square_s(sees: Sees, more: dict[str, object]) -> None:
    p = problem(**({"rows": 2, "tokens": 290, "heads": 2, "groups": 2, "sees": sees} | more))
    upstream = torch.randn(p.q.shape, dtype=torch.float64)
    plan, leaves = p.plan("matmul"), p.leaves()
    assert len(plan.blocks) == 3
    # Without blocks the whole square is done at once, by autograd.
    square = attend(p.q, p.view, p.step, p.sees, p.scores, replace(plan, blocks=()))
    wanted = torch.autograd.grad((square * upstream).sum(), leaves)
    for got, want in zip(p.gradients("matmul", upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_a_soft_cap_keeps_two_squares() -> None:
    """The probabilities and the tanh: what a soft cap adds is no more than that."""
    sizes = [sum(t.numel() for t in _saved(problem(rows=1, tokens=200, softcap=cap))) for cap in (None, 1.5)]
    assert sizes[1] - sizes[0] == 4 * 200 * 200


def _saved(p: Problem) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    p.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        p.run("matmul")
    return saved


@given(problems(with_bias=None), st.sampled_from(["matmul", "tiled"]))
def test_the_log_sum_exp_has_gradients(p: Problem, backend: str) -> None:
    leaves, grads = p.leaves(), []
    for name in (backend, "oracle"):
        out, lse = attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan(name))
        total = (out.sin().sum() + lse.where(lse.isfinite(), 0.0).cos().sum()).double()
        grads.append(torch.autograd.grad(total, leaves, allow_unused=True))
    for got, want in zip(*grads):
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@given(problems(with_bias=None), st.integers(1, 12), st.integers(1, 12))
def test_any_tile_sizes_give_the_same(p: Problem, block_q: int, block_k: int) -> None:
    from assay.ops.attend import api

    call, _ = api._call(p.q, p.view, p.step, p.sees, p.scores, p.plan("tiled"))
    out, lse = run_tiled(call, block_q, block_k)
    want, want_lse = attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan("oracle"))
    torch.testing.assert_close(out.reshape(want.shape), want, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(lse.reshape(want_lse.shape), want_lse, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("sees", RULES, ids=str)
@pytest.mark.parametrize("more", [{"past": 5}, {"packed": True}, {"flat": True}, {"blank": 6, "rows": 1}], ids=str)
def test_no_tile_is_skipped_or_left_unmasked(sees: Sees, more: dict[str, object]) -> None:
    from assay.ops.attend import api

    p = problem(**({"rows": 2, "tokens": 23, "sees": sees} | more))
    call, _ = api._call(p.q, p.view, p.step, p.sees, p.scores, p.plan("tiled"))
    want, _ = attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan("oracle"))
    for block_q, block_k in ((3, 2), (1, 2)):
        out, _ = run_tiled(call, block_q, block_k)
        torch.testing.assert_close(out.reshape(want.shape), want, atol=1e-11, rtol=1e-11)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def held(backend: str, tokens: int) -> tuple[int, int]:
    """Elements saved for the backward pass, and of the largest tensor of forward and backward."""
    p = problem(rows=1, tokens=tokens, heads=2, groups=2, size=64)
    saved: dict[int, int] = {}
    p.leaves()

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = p.run(backend)
        out.sum().backward()
    return sum(saved.values()), largest.numel


def test_tiled_memory_is_linear_and_the_square_is_not() -> None:
    for short, long in zip(held("tiled", 512), held("tiled", 1024)):
        assert long == 2 * short
    for short, long in zip(held("matmul", 512), held("matmul", 1024)):
        assert long > 2.5 * short
    assert held("tiled", 1024)[1] <= 1024 * 2 * 64


@pytest.mark.parametrize("sees,masks", [(Sees(), 4), (Sees(causal=False), 0), (Sees(window=64), 7)], ids=str)
def test_tiled_makes_masks_only_where_a_tile_is_partly_seen(
    sees: Sees, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[slice] = []
    visible = Call.visible
    monkeypatch.setattr(Call, "visible", lambda call, q, k: made.append(q) or visible(call, q, k))
    problem(tokens=256, rows=1, sees=sees).run("tiled")
    assert len(made) == masks


def traffic(tokens: int, sees: Sees, block: int) -> tuple[Traffic, Traffic]:
    from assay.ops.attend import api

    p = problem(rows=1, tokens=tokens, heads=1, groups=1, size=16, sees=sees)
    call, _ = api._call(p.q, p.view, p.step, p.sees, p.scores, p.plan("tiled"))
    counted = Traffic()
    run_tiled(call, block, block, counted)
    return counted, naive_traffic(call)


def test_traffic_is_what_the_algorithm_says() -> None:
    """FlashAttention-2's forward reads Q once, K and V once for every query tile, and writes O and the log-sum-exp."""
    tiled, naive = traffic(128, Sees(causal=False), 32)
    assert tiled == Traffic(128 * 16 + 4 * 2 * 128 * 16, 128 * 16 + 128)
    assert naive == Traffic(3 * 128 * 16 + 2 * 128 * 128, 2 * 128 * 128 + 128 * 16)
    causal, _ = traffic(128, Sees(), 32)
    assert causal.read == 128 * 16 + (1 + 2 + 3 + 4) * 2 * 32 * 16  # nobody sees the tiles above the diagonal
    window, _ = traffic(128, Sees(window=32), 32)
    assert window.read == 128 * 16 + (1 + 2 + 2 + 2) * 2 * 32 * 16


def test_a_tile_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="`block_q` is 0"):
        traffic(8, Sees(), 0)
