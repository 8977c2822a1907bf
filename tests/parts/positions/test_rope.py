"""RoPE as algebra: rotations, relative scores, layouts, and keys that are turned when written or when read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from assay.ops.state import step_layout
from assay.ops.step import Step, View, rows_step
from assay.parts.positions.rope import Rope, RopePosition, Turns, apply_rope, reference, turn, turns, wavelengths
from assay.spec.base import Site

DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original": 8}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate(x: Tensor, position: int, **options: object) -> Tensor:
    """x [K] turned to a position."""
    y = x.view(1, 1, 1, -1)
    return apply_rope(y, y, torch.tensor([position]), **options)[0].view(-1)  # type: ignore[arg-type]


def built(spec: Rope, head_dim: int = 8) -> RopePosition:
    part = spec.build(Site())
    part.serve(2, head_dim)
    return part


def step_of(tokens: int, **more: object) -> Step:
    return rows_step(torch.zeros(1, tokens, dtype=torch.long), **more)  # type: ignore[arg-type]


def with_table(part: RopePosition, step: Step) -> Step:
    return step.with_(tables={part.name: part.prepare(step, None)})


def test_rotations_form_a_group() -> None:
    x = noise(16)
    assert torch.equal(rotate(x, 0), x)
    for m, n in ((3, 9), (100, 1), (4000, 4000)):
        assert torch.allclose(rotate(rotate(x, m), n), rotate(x, m + n), rtol=0, atol=1e-12)
        assert abs(rotate(x, m).norm() - x.norm()) < 1e-12


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = noise(16, seed=1), noise(16, seed=2)
    for dim in (None, 6):
        near = rotate(q, 7, dim=dim) @ rotate(k, 2, dim=dim)
        far = rotate(q, 907, dim=dim) @ rotate(k, 902, dim=dim)
        assert abs(near - far) < 1e-12
        assert abs(near - rotate(q, 8, dim=dim) @ rotate(k, 2, dim=dim)) > 1e-3


def test_partial_leaves_the_rest_alone() -> None:
    x = noise(16)
    y = rotate(x, 5, dim=6)
    assert torch.equal(y[6:], x[6:])
    assert torch.allclose(y[:6], rotate(x[:6], 5), rtol=0, atol=1e-15)


def test_half_split_equals_interleaved_with_permuted_projections() -> None:
    heads, size, tokens = 2, 8, 5
    x, wq, wk = noise(tokens, 12), noise(heads * size, 12, seed=1), noise(heads * size, 12, seed=2)
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    rows = torch.cat([order + h * size for h in range(heads)])
    positions = torch.arange(tokens)

    def interleaved(t: Tensor) -> Tensor:
        """[H, T, K] by complex numbers: pair (2i, 2i+1), as in the paper's eq. 34."""
        z = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        angle = positions[:, None] * 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def projected(w: Tensor) -> Tensor:
        return (x @ w.T).view(tokens, heads, size).transpose(0, 1)

    theirs = interleaved(projected(wq)) @ interleaved(projected(wk)).transpose(1, 2)
    q, k = apply_rope(projected(wq[rows])[None], projected(wk[rows])[None], positions)
    assert torch.allclose((q @ k.transpose(2, 3))[0], theirs, rtol=0, atol=1e-12)
    q, k = apply_rope(projected(wq)[None], projected(wk)[None], positions)
    assert not torch.allclose((q @ k.transpose(2, 3))[0], theirs, atol=1e-2)


def test_gradients_of_the_fused_turn() -> None:
    x = noise(3, 2, 8).requires_grad_()
    for gain in (1.0, 1.3):
        t = turns(Rope(dim=4), torch.tensor([1, 5, 9]), 8, torch.tensor([10]))
        t = Turns(t.cos * gain, t.sin * gain)
        assert torch.autograd.gradcheck(lambda y, t=t: turn(y, t), (x,))
        assert torch.autograd.gradgradcheck(lambda y, t=t: turn(y, t), (x,))


@pytest.mark.parametrize("spec", list(Rope.tiny()), ids=lambda s: s.scaling.kind if s.scaling else "plain")
def test_part_equals_the_reference(spec: Rope) -> None:
    part, step = built(spec), step_of(12)
    q, k = noise(12, 2, 8), noise(12, 1, 8, seed=1)
    mine_q, mine_k = part.on_qk(q, k, step)
    assert torch.equal(mine_k, k) == spec.reads
    _, view = part.on_read(mine_q, View({"k": mine_k[None], "v": k[None]}, step_layout(step)), step)
    theirs_q, theirs_k = reference(spec, {}, q, k, step.positions)
    assert torch.allclose(mine_q, theirs_q, rtol=0, atol=1e-12)
    assert torch.allclose(view.dense("k")[0], theirs_k, rtol=0, atol=1e-12)
    assert torch.equal(view.dense("v")[0], k)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.bfloat16, 6e-2)])
def test_table_of_the_step_in_the_models_dtype(dtype: torch.dtype, error: float) -> None:
    """Angles come from float64: at position 100 000 only cos, sin and the products are rounded."""
    part = built(Rope())
    step = with_table(part, step_of(4, past=100_000))
    q = noise(4, 2, 8).to(dtype)
    mine, _ = part.on_qk(q, q[:, :0], step)
    theirs, _ = reference(part.spec, {}, q, q[:, :0], step.positions)
    assert mine.dtype == dtype
    assert (mine.double() - theirs).abs().max() < error


def test_heads_of_two_sizes_share_one_scheme() -> None:
    part = built(Rope(), 8)
    part.serve(2, 16)
    step = with_table(part, step_of(6))
    for size in (8, 16):
        q = noise(6, 2, size).float()
        mine, _ = part.on_qk(q, q, step)
        assert torch.allclose(mine.double(), reference(part.spec, {}, q, q, step.positions)[0], atol=1e-6)


def test_each_sequence_plans_for_its_own_horizon() -> None:
    part = built(Rope.model_validate({"scaling": DYNAMIC}))
    step = rows_step(torch.zeros(2, 6, dtype=torch.long)).with_(horizon=torch.tensor([8, 40]))
    q = noise(12, 1, 8)
    mine, _ = part.on_qk(q, q[:, :0], step)
    for row, horizon in ((slice(0, 6), 8), (slice(6, 12), 40)):
        theirs, _ = reference(part.spec, {}, q[row], q[row], step.positions[row], horizon)
        assert torch.allclose(mine[row], theirs, rtol=0, atol=1e-12)
    plain, _ = reference(Rope(), {}, q[:6], q[:6], step.positions[:6])
    assert torch.allclose(mine[:6], plain, rtol=0, atol=1e-12)


def attended(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention weights of one head: q [T, K], k [S, K]."""
    z = q @ k.T / math.sqrt(q.shape[1])
    mask = torch.arange(k.shape[0]) <= torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    return z.masked_fill(~mask, -math.inf).softmax(-1)


def decoded(old: Rope, new: Rope) -> float:
    """Nine keys stored under `old`, a tenth token under `new`, against all ten under `new`: the largest difference."""
    q, k = noise(10, 1, 8, seed=3), noise(10, 1, 8, seed=4)
    first, last = step_of(9), step_of(1, past=9)
    stored = built(old).on_qk(q[:9], k[:9], first)[1]
    part = built(new)
    query, key = part.on_qk(q[9:], k[9:], last)
    layout = step_layout(step_of(10))
    _, view = part.on_read(query, View({"k": torch.cat([stored, key])[None]}, layout), last)
    turned_q, turned_k = reference(new, {}, q, k, torch.arange(10))
    mine = attended(query[:, 0], view.dense("k")[0, :, 0])
    return float((mine - attended(turned_q[:, 0], turned_k[:, 0])[9:]).abs().max())


def test_raw_keys_survive_a_change_of_base_and_turned_keys_do_not() -> None:
    assert decoded(Rope(turns="read"), Rope(turns="read", theta=500.0)) < 1e-12
    assert decoded(Rope(turns="write"), Rope(turns="write")) < 1e-12
    assert decoded(Rope(turns="write"), Rope(turns="write", theta=500.0)) > 1e-3


def test_wavelengths() -> None:
    waves = wavelengths(Rope(theta=10_000.0), 64)
    assert waves[0] == pytest.approx(2 * math.pi)
    assert waves[-1] == pytest.approx(2 * math.pi * 10_000 ** (62 / 64))
    assert wavelengths(Rope.model_validate({"scaling": {"kind": "linear", "factor": 4.0}}), 64) == pytest.approx(
        [4 * w for w in waves]
    )
    assert len(wavelengths(Rope(dim=8), 64)) == 4


def test_apply_rope_per_sequence_positions() -> None:
    q, k = noise(2, 3, 4, 8), noise(2, 1, 4, 8, seed=1)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    mine = apply_rope(q, k, positions)
    for b in range(2):
        theirs = reference(Rope(), {}, q[b].transpose(0, 1), k[b].transpose(0, 1), positions[b])
        assert torch.allclose(mine[0][b].transpose(0, 1), theirs[0], rtol=0, atol=1e-12)
        assert torch.allclose(mine[1][b].transpose(0, 1), theirs[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "heads", "said"),
    [
        ({"dim": 5}, 8, "even"),
        ({"dim": 16}, 8, "a head has 8"),
        ({}, 7, "even"),
        ({"scaling": {"kind": "ntk", "factor": 2.0}, "dim": 2}, 8, "at least 4"),
        ({"scaling": {"kind": "longrope", "short": [1], "long": [2], "original": 4, "factor": 2}}, 8, "need 4"),
    ],
)
def test_refuses_heads_that_do_not_turn(fields: dict[str, object], heads: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rope.model_validate(fields).fits(2, heads)


def test_refuses_to_store_turned_keys_whose_angles_depend_on_the_length() -> None:
    with pytest.raises(ValueError, match="accepted: read"):
        Rope.model_validate({"scaling": DYNAMIC, "turns": "write"}).check(Site())
