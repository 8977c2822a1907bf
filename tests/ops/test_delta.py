"""The delta rule and its relatives against their definitions, matrix by matrix; what the rule does, and its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad

from assay.ops.scan.delta import Updates, chunkwise, delta_rule, rank_one, recurrent, run
from assay.ops.state import Rows

L, H, K, V = 2, 2, 4, 3
KINDS = ("plain", "head", "channel", "rank")


def drawn(length: int, kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Unit keys, rates in (0, 2), log decays in (-1.5, 0); for `rank` any vectors that are removed."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(L, length, H, *shape, generator=g, dtype=torch.float64)

    k, spread = normal(K), {"head": (), "channel": (K,), "rank": (K,)}.get(kind)
    found = {"q": normal(K), "k": k / k.norm(dim=-1, keepdim=True), "v": normal(V), "beta": 2 * torch.sigmoid(normal())}
    if spread is not None:
        found["decay"] = -1.5 * torch.sigmoid(normal(*spread))
    if kind == "rank":
        found |= {"a": normal(K) / 2, "b": normal(K) / 2}
    return found | {"past": torch.randn(L, H, K, V, generator=g, dtype=torch.float64)}


def updates(x: dict[str, Tensor]) -> Updates:
    if "a" in x:
        return rank_one(x["q"], (x["a"], x["b"]), x["k"], x["v"], x["decay"])
    return delta_rule(x["q"], x["k"], x["v"], x["beta"], x.get("decay"))


def by_definition(x: dict[str, Tensor], segment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each lane, head and token by itself: the transition as a matrix."""
    ends, outs = [], []
    for lane in range(L):
        for h in range(H):
            state = x["past"][lane, h]
            for t in range(x["q"].shape[1]):
                if segment is not None and t and segment[lane, t] != segment[lane, t - 1]:
                    state = torch.zeros_like(state)
                q, k, v, beta = (x[n][lane, t, h] for n in ("q", "k", "v", "beta"))
                w = (
                    torch.exp(x["decay"][lane, t, h]) * torch.ones(K).double()
                    if "decay" in x
                    else torch.ones(K).double()
                )
                if "a" in x:
                    moved = torch.diag(w) + torch.outer(x["b"][lane, t, h], x["a"][lane, t, h])
                    state = moved @ state + torch.outer(k, v)
                else:
                    kept = torch.eye(K, dtype=torch.float64) - beta * torch.outer(k, k)
                    state = kept @ torch.diag(w) @ state + beta * torch.outer(k, v)
                outs.append(q @ state)
            ends.append(state)
    out = torch.stack(outs).view(L, H, -1, V).transpose(1, 2)
    return out, torch.stack(ends).view(L, H, K, V)


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=5, deadline=None)
@given(length=st.integers(2, 19), chunk=st.integers(1, 16), seed=st.integers(0, 99), packed=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_definition(kind: str, length: int, chunk: int, seed: int, packed: bool) -> None:
    """Outputs, states and the gradients of both with respect to everything, also where documents share a lane."""
    x = {name: z.requires_grad_() for name, z in drawn(length, kind, seed).items()}
    borders = torch.rand(L, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    segment = borders.cumsum(1) if packed else None
    if segment is not None:
        segment = segment - segment[:, :1]
    learned = [z for name, z in x.items() if not (name == "beta" and kind == "rank")]
    expected = by_definition(x, segment)
    probe = [torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype) for z in expected]

    def slopes(found: tuple[Tensor, Tensor]) -> Any:
        return grad([(z * p).sum() for z, p in zip(found, probe, strict=True)], learned, materialize_grads=True)

    wanted = slopes(expected)
    for form in (recurrent, chunkwise):
        found = form(updates(x), x["past"], segment, chunk)
        for mine, theirs in zip((*found, *slopes(found)), (*expected, *wanted), strict=True):
            equal(mine, theirs, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_carried(kind: str) -> None:
    """A lane in pieces, single tokens among them, is the lane."""
    x = drawn(17, kind)
    whole, end = run(updates(x), x["past"], keeps=True, chunk=8)
    state, pieces = x["past"], []
    for part in torch.arange(17).split([5, 1, 9, 1, 1]):
        piece = {name: z if name == "past" else z[:, part] for name, z in x.items()}
        out, now = run(updates(piece), state, keeps=True, chunk=4)
        assert now is not None
        state = now
        pieces.append(out)
    assert end is not None and run(updates(x), x["past"])[1] is None
    equal(torch.cat(pieces, 1), whole)
    equal(state, end)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_starts_from_its_row_of_a_pool(kind: str, length: int) -> None:
    x = drawn(length, kind)
    past, order = x["past"], torch.arange(len(x["past"])).flip(0)
    pool = torch.cat([torch.full_like(past[:1], torch.nan), past.flip(0)])
    out, end = run(updates(x), Rows(pool, order + 1), keeps=True, chunk=4)
    assert end is not None
    for found, exact in zip((out, end), by_definition(x), strict=True):
        equal(found, exact)


def test_what_reduces_to_what() -> None:
    """No decay: the plain rule. Equal channels: one number a head. The general form with the rule's own vectors: the
    rule."""
    x = drawn(13, "head")
    plain, none = {n: z for n, z in x.items() if n != "decay"}, torch.zeros_like(x["decay"])
    equal(run(updates({**x, "decay": none}), x["past"], chunk=4)[0], run(updates(plain), x["past"], chunk=4)[0])
    spread = x["decay"][..., None].expand(-1, -1, -1, K)
    gated = run(updates(x), x["past"], chunk=4)[0]
    equal(run(updates({**x, "decay": spread}), x["past"], chunk=4)[0], gated)
    rate, w = x["beta"][..., None], spread.exp()
    general = rank_one(x["q"], (w * x["k"], -rate * x["k"]), x["k"], rate * x["v"], spread)
    equal(run(general, x["past"], chunk=4)[0], gated)


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_hold_nothing_leave_the_state(kind: str) -> None:
    """Bit for bit in the recurrence, and to rounding in chunks."""
    x = drawn(9, kind)
    quiet = {
        n: torch.zeros_like(z) if n in ("beta", "decay", "a") or (n, kind) == ("v", "rank") else z for n, z in x.items()
    }
    assert torch.equal(recurrent(updates(quiet), x["past"])[1], x["past"])
    assert torch.equal(chunkwise(updates(quiet), x["past"], None, 4)[1], x["past"])


def keyed(k: Tensor, v: Tensor, q: Tensor, beta: float = 1.0) -> Updates:
    """One lane and one head from rows of keys, values and queries."""
    lane = (z[None, :, None] for z in (q, k, v))
    return delta_rule(*lane, torch.full((1, len(k), 1), beta, dtype=k.dtype))


def test_orthonormal_keys_are_recalled_and_rewritten() -> None:
    """K keys hold K values exactly; writing one again replaces its value and no other's, where an additive memory
    gives the sum."""
    g = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))[0]
    values, new = torch.randn(8, 5, generator=g, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    k, v = torch.cat([keys, keys[3:4]]), torch.cat([values, new[None]])
    state = run(keyed(k, v, k), torch.zeros(1, 1, 8, 5).double(), keeps=True, chunk=4)[1]
    assert state is not None
    expected = values.clone()
    expected[3] = new
    equal(keys @ state[0, 0], expected)
    equal(keys[3] @ (k.T @ v), values[3] + new)


@pytest.mark.parametrize("beta", [0.3, 1.0, 1.7, 2.0])
def test_a_transition_has_one_eigenvalue_that_is_not_one(beta: float) -> None:
    k = torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = k / k.norm()
    moved = run(keyed(k, torch.zeros(1, 5).double(), k, beta), torch.eye(5).double()[None, None], keeps=True)[1]
    assert moved is not None
    equal(torch.linalg.eigvalsh(moved[0, 0]), torch.tensor([1 - beta, 1, 1, 1, 1], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(("beta", "turns"), [(0.5, False), (0.95, False), (1.5, True), (1.9, True)])
def test_only_a_rate_above_one_turns_round(beta: float, turns: bool) -> None:
    """A token that is repeated moves what is read by (1 - beta)^n times its first move: always the same way for a rate
    below one, so that no threshold on it counts modulo two; to and fro above (arXiv 2411.12537, section 3)."""
    g = torch.Generator().manual_seed(2)
    k, v, q = (torch.randn(1, n, generator=g, dtype=torch.float64) for n in (6, 3, 6))
    u = keyed((k / k.norm()).expand(12, -1), v.expand(12, -1), q.expand(12, -1), beta)
    read = run(u, torch.randn(1, 1, 6, 3, generator=g, dtype=torch.float64), chunk=8)[0][0, :, 0]
    moves = read.diff(dim=0)
    equal(moves[1:], (1 - beta) * moves[:-1])
    assert bool((moves[1:] * moves[:-1] < 0).all()) == turns


@pytest.mark.parametrize("kind", ["head", "channel", "rank"])
@pytest.mark.parametrize("strength", [0.01, 3.0, 60.0, 2000.0])
def test_float32_under_any_decay(kind: str, strength: float) -> None:
    """Forgetting by 60 nats a token, or 2000, among tokens that forget nothing: finite, and as exact as one token
    after another, where a cumulative sum of 64 tokens is in the thousands."""
    x = {
        n: torch.cat([drawn(64, kind, s)[n] for s in (0, 1)], 1) if n != "past" else z
        for n, z in drawn(64, kind).items()
    }
    if "a" in x:
        x |= {"a": x["k"] / 2, "b": -x["k"]}
    often = torch.rand(x["decay"].shape, generator=torch.Generator().manual_seed(3)) < 0.3
    x["decay"] = torch.where(often, x["decay"] * strength, x["decay"] * 0.01)
    low = {name: z.float().requires_grad_() for name, z in x.items()}
    exact, end = recurrent(updates(x), x["past"])
    out, state = chunkwise(updates(low), low["past"], None, 64)
    assert torch.isfinite(out).all() and torch.isfinite(state).all()
    equal(out.double(), exact, 2e-5)
    equal(state.double(), end, 2e-5)
    slopes = grad(out.sum(), [low[n] for n in ("q", "k", "v", "decay")])
    assert all(torch.isfinite(z).all() for z in slopes)


def test_repeated_keys_do_not_spoil_the_solve() -> None:
    """Sixty-four times nearly the same key at a rate near one: the powers of the triangular system grow to binomial
    coefficients of 10^18, and substitution never forms them."""
    g = torch.Generator().manual_seed(4)
    k = torch.ones(64, 16, dtype=torch.float64) + 0.01 * torch.randn(64, 16, generator=g, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True)
    u = keyed(k, torch.randn(64, 4, generator=g, dtype=torch.float64), k, 0.98)
    past = torch.randn(1, 1, 16, 4, generator=g, dtype=torch.float64)
    exact = recurrent(u, past)[0]
    equal(chunkwise(u.each(torch.Tensor.float), past.float(), None, 64)[0].double(), exact, 1e-5)


def test_half_precision_is_summed_in_the_states_dtype() -> None:
    x = drawn(24, "head")
    low = updates({n: z.bfloat16() for n, z in x.items()})
    out, end = run(low, x["past"].float(), keeps=True)
    same = run(low.each(torch.Tensor.double), x["past"], keeps=True)
    assert out.dtype == torch.bfloat16 and end is not None and end.dtype == torch.float32
    assert same[1] is not None
    equal(end.double(), same[1], 1e-5)
    equal(out.double(), same[0], 2e-2)
    assert replace(low, late=False).by_head is False
