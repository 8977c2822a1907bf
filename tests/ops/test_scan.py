"""Recurrences with a decay and an outer product: in chunks, in squares and token by token they are one function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.ops.lanes import Lanes
from assay.ops.scan.decayed import cost, decayed, recurrent, segment_sums

H, K, V = 4, 3, 5
FORMS = ("none", "head", "shared", "channel")
CHUNKS = st.sampled_from([1, 2, 4, 8, 64])
Drawn = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


def drawn(lanes: int, length: int, form: str, seed: int, strength: float = 1.0) -> Drawn:
    """q, k, v, log decays (`shared`: by one lane for all) and a state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shape = {"none": (), "head": (lanes, length, H), "shared": (1, length, H), "channel": (lanes, length, H, K)}[form]
    decay = -strength * normal(*shape).abs() if shape else None
    return (
        normal(lanes, length, H, K),
        normal(lanes, length, H, K),
        normal(lanes, length, H, V),
        decay,
        normal(lanes, H, K, V),
    )


def full(decay: Tensor | None, like: Tensor) -> Tensor:
    """A log decay for every lane, head and channel."""
    if decay is None:
        return torch.zeros_like(like)
    return (decay if decay.dim() == 4 else decay[..., None]).expand_as(like)


def squared(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, past: Tensor, segment: Tensor | None) -> Tensor:
    """The quadratic form: o_t = q_t prod(a) S_0 + sum_{j<=t} (q_t prod_{j<i<=t}(a_i) k_j) v_j."""
    rows = []
    for t in range(q.shape[1]):
        row = torch.einsum("lhk,lhkv->lhv", q[:, t] * decay[:, : t + 1].sum(1).exp(), past)
        row = row if segment is None else row * (segment[:, t] == 0)[:, None, None]
        for j in range(t + 1):
            share = (q[:, t] * decay[:, j + 1 : t + 1].sum(1).exp() * k[:, j]).sum(-1)
            share = share if segment is None else share * (segment[:, t] == segment[:, j])[:, None]
            row = row + share[..., None] * v[:, j]
        rows.append(row)
    return torch.stack(rows, 1)


def segments(lanes: int, length: int, seed: int) -> Tensor:
    starts = torch.rand(lanes, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    found = starts.cumsum(1)
    return found - found[:, :1]


@given(
    length=st.integers(1, 11), form=st.sampled_from(FORMS), chunk=CHUNKS, packed=st.booleans(), seed=st.integers(0, 9)
)
@settings(max_examples=60)
def test_chunks_squares_and_the_recurrence_agree(length: int, form: str, chunk: int, packed: bool, seed: int) -> None:
    """Outputs, the state at the end, and the gradients of everything."""
    q, k, v, decay, past = (t if t is None else t.requires_grad_() for t in drawn(2, length, form, seed))
    assert q is not None and k is not None and v is not None and past is not None
    lanes = Lanes(2, length, segment=segments(2, length, seed) if packed else None)
    fast, end = decayed(q, k, v, decay, past, lanes, chunk)
    slow, last = recurrent(q, k, v, full(decay, q), past, lanes)
    both = squared(q, k, v, full(decay, q), past, lanes.segment)
    assert torch.allclose(fast, slow, rtol=0, atol=1e-11) and torch.allclose(both, slow, rtol=0, atol=1e-11)
    assert (end is None) == packed
    probe, inputs = (
        torch.sin(torch.arange(fast.numel())).view_as(fast),
        [t for t in (q, k, v, decay, past) if t is not None],
    )
    ours, theirs = (fast * probe).sum(), (slow * probe).sum()
    if end is not None:
        assert torch.allclose(end, last, rtol=0, atol=1e-11)
        ours, theirs = ours + end.pow(3).sum(), theirs + last.pow(3).sum()
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@given(
    length=st.integers(2, 11), form=st.sampled_from(("none", "head", "channel")), chunk=CHUNKS, seed=st.integers(0, 9)
)
def test_a_state_goes_on_where_each_lane_ended(length: int, form: str, chunk: int, seed: int) -> None:
    """f(x1:T) is f(xa), then f(xb | state): lanes that end at places of their own hold nothing behind."""
    q, k, v, decay, past = drawn(3, length, form, seed)
    whole, end = decayed(q, k, v, decay, past, Lanes(3, length), chunk)
    cut = torch.randint(1, length, (3,), generator=torch.Generator().manual_seed(seed))
    early = torch.arange(length)[None] < cut[:, None]

    def part(x: Tensor, keep: Tensor) -> Tensor:
        return x * keep.view(3, length, *(1,) * (x.dim() - 2))

    def run(keep: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        left = decay if decay is None else part(decay, keep)
        out, last = decayed(part(q, keep), part(k, keep), part(v, keep), left, state, Lanes(3, length), chunk)
        assert last is not None
        return part(out, keep), last

    first, between = run(early, past)
    second, last = run(~early, between)
    assert end is not None and torch.allclose(last, end, rtol=0, atol=1e-11)
    assert torch.allclose(first + second, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("few", ["k", "both"])
@pytest.mark.parametrize("form", FORMS)
def test_heads_that_serve_several(form: str, few: str) -> None:
    """Two heads of keys (and of queries) for four of values are the same heads repeated."""
    for length in (1, 7):
        q, k, v, decay, past = drawn(2, length, form, 3)
        q, k = (q[:, :, :2] if few == "both" else q), k[:, :, :2]
        lanes = Lanes(2, length)
        out, end = decayed(q, k, v, decay, past, lanes, 4)
        wide = q.repeat_interleave(2, 2) if few == "both" else q
        slow, last = recurrent(wide, k.repeat_interleave(2, 2), v, full(decay, wide), past, lanes)
        assert end is not None
        assert torch.allclose(out, slow, rtol=0, atol=1e-11) and torch.allclose(end, last, rtol=0, atol=1e-11)


def test_one_decay_said_in_several_ways() -> None:
    """Decays of 0 are linear attention's, equal channels are a number a head, and a constant is RetNet's mask."""
    q, k, v, _, past = drawn(2, 9, "none", 1)
    lanes, gamma = Lanes(2, 9), torch.tensor([0.5, 0.75, 0.875, 0.9375], dtype=torch.float64)
    plain = decayed(q, k, v, None, past, lanes, 4)[0]
    for zeros in (torch.zeros(1, 9, H).double(), torch.zeros(1, 9, H, K).double()):
        assert torch.allclose(decayed(q, k, v, zeros, past, lanes, 4)[0], plain, rtol=0, atol=1e-12)
    scores = torch.einsum("lthk,lshk->lhts", q, k).tril()
    assert torch.allclose(plain, torch.einsum("lhts,lshv->lthv", scores, v) + torch.einsum("lthk,lhkv->lthv", q, past))
    by_head = gamma.log().expand(1, 9, H)
    constant = decayed(q, k, v, by_head, 0 * past, lanes, 4)[0]
    channels = decayed(q, k, v, by_head[..., None].expand(1, 9, H, K), 0 * past, lanes, 4)[0]
    away = torch.arange(9)[:, None] - torch.arange(9)
    mask = (gamma[:, None, None] ** away.clamp(min=0)).tril()  # RetNet, eq. 5
    assert torch.allclose(constant, torch.einsum("lhts,lshv->lthv", scores * mask, v), rtol=0, atol=1e-12)
    assert torch.allclose(channels, constant, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["head", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 30.0, 1e30])
def test_strong_decays_in_float32(form: str, strength: float) -> None:
    """Weak and strong ones in one chunk: as exact as the recurrence, where differences of cumulative sums are not."""
    q, k, v, decay, past = drawn(2, 70, form, 5)
    assert decay is not None
    decay = (
        torch.where(torch.rand(decay.shape, generator=torch.Generator().manual_seed(1)) < 0.2, strength, 0.01) * decay
    )
    lanes = Lanes(2, 70)
    exact, end = recurrent(q, k, v, full(decay, q), past, lanes)
    low = [t.float().requires_grad_() for t in (q, k, v, decay, past)]
    out, last = decayed(low[0], low[1], low[2], low[3], low[4], lanes, 64)
    assert last is not None
    assert (out - exact).abs().max() < 3e-5 and (last - end).abs().max() < 3e-5
    for grad in torch.autograd.grad(out.sum() + last.sum(), low):
        assert grad.isfinite().all()


def test_sums_over_segments_where_differences_fail() -> None:
    x = torch.tensor([-0.5, -1e30, -0.25, -torch.inf, -0.125, -0.0625])
    total = x.cumsum(0)
    naive = total[:, None] - total[None, :]
    ours = segment_sums(x)
    assert naive[5, 4].isnan() and float(naive[2, 1]) == 0.0
    assert float(ours[5, 4]) == -0.0625 and float(ours[2, 1]) == -0.25 and float(ours[5, 3]) == -0.1875
    assert bool((ours.diagonal() == 0).all()) and float(ours[3, 2]) == -torch.inf and float(ours[0, 1]) == -torch.inf


def test_half_precision_is_summed_in_float32() -> None:
    """A thousand equal terms in bfloat16 stop growing at 256; the sum in float32 does not."""
    one = torch.ones(1, 1000, 1, 1, dtype=torch.bfloat16)
    out, end = decayed(one, one, one, None, torch.zeros(1, 1, 1, 1), Lanes(1, 1000))
    assert end is not None and end.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert float(end) == 1000.0 and float(out[0, -1]) == 1000.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 5, 13])
def test_executed_flops_are_those_counted(form: str, length: int) -> None:
    q, k, v, decay, past = drawn(1, length, form, 0)
    groups = H if form == "channel" else 2
    with FlopCounterMode(display=False) as counter:
        decayed(q[:, :, :groups], k[:, :, :groups], v, decay, past, Lanes(1, length), 4)
    assert counter.get_total_flops() == cost(length, H, (K, V), groups, 4, form == "channel").executed


def unit(count: int, size: int, seed: int) -> Tensor:
    x = torch.randn(1, count, 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def recalled(keys: Tensor, values: Tensor) -> Tensor:
    """What the state after all pairs answers to each key."""
    lanes, nothing = Lanes(1, keys.shape[1]), torch.zeros(1, 1, keys.shape[-1], values.shape[-1], dtype=torch.float64)
    end = decayed(keys, keys, values, None, nothing, lanes, 16)[1]
    assert end is not None
    return torch.einsum("ltk,lkv->ltv", keys[:, :, 0], end[:, 0])


def test_as_many_pairs_as_a_key_has_numbers_are_recalled_exactly() -> None:
    """n <= d_k orthonormal keys do not disturb one another; one more pair must."""
    basis = torch.linalg.qr(unit(32, 32, 0)[0, :, 0])[0]
    values = unit(33, 8, 1)
    exact = recalled(basis[None, :, None], values[:, :32])
    assert torch.allclose(exact, values[:, :32, 0], rtol=0, atol=1e-12)
    one_more = recalled(torch.cat([basis, basis[:1]])[None, :, None], values)
    assert (one_more - values[:, :, 0]).abs().max() > 0.1


def test_interference_grows_with_pairs_over_key_size() -> None:
    """n random unit keys: what the other pairs add to an answer has power (n - 1) / d_k."""
    loads, powers = [], []
    for size, count in ((16, 9), (16, 33), (64, 33), (64, 129), (64, 257)):
        values = [unit(count, 24, seed + 100) for seed in range(16)]
        wrong = [recalled(unit(count, size, seed), v) - v[:, :, 0] for seed, v in enumerate(values)]
        loads.append((count - 1) / size)
        powers.append(float(torch.stack(wrong).square().sum(-1).mean()))
    load, power = torch.tensor(loads), torch.tensor(powers)
    assert 0.97 < float((load * power).sum() / (load * load).sum()) < 1.03, powers
    assert (power / load - 1).abs().max() < 0.1, powers
