"""Compiled norm and turn against their formulas in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.engine.sampler import largest
from assay.ops.activations import Activation, activate, glu, reference
from assay.ops.native import Kernels
from assay.ops.tape import agrees
from assay.parts.positions.rope import Rope, turns
from assay.parts.positions.rope import reference as rope_reference
from tests.ops.natives import DTYPES, ROUND, drawn

floats = st.sampled_from(DTYPES)


@given(st.integers(1, 9), st.integers(1, 70), floats, st.booleans(), st.sampled_from((0.0, 1.0)), st.booleans())
def test_norm_is_the_formula_in_float64_to_the_rounding(
    kernels: Kernels, rows: int, size: int, dtype: torch.dtype, weighted: bool, shift: float, heads: bool
) -> None:
    x = drawn(0, dtype, rows, 3, size) if heads else drawn(0, dtype, rows, size + 3)[:, 1 : size + 1]
    w = drawn(1, dtype, size) if weighted else None
    found = kernels.rms_norm(x, w, 1e-3, shift)
    assert found is not None and found.shape == x.shape
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    exact = exact if w is None else exact * (w.double() + shift)
    torch.testing.assert_close(found.double(), exact, rtol=ROUND[dtype] + 1e-6, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 20), st.integers(0, 9), floats, st.integers(0, 3))
def test_the_turn_is_ropes_reference_to_the_rounding(
    kernels: Kernels, rows: int, heads: int, half: int, still: int, dtype: torch.dtype, pad: int
) -> None:
    size = 2 * half + still
    x = drawn(0, dtype, rows, heads, size + pad)[:, :, pad:]
    positions = torch.arange(rows) * 7
    spec = Rope(theta=100.0, dim=2 * half)
    cos, sin = turns(spec, positions, size, torch.full((1,), 99)).to(torch.float32)
    found = kernels.turn(x, cos, sin)
    assert found is not None
    exact, _ = rope_reference(spec, {}, x, x[:, :1], positions)
    torch.testing.assert_close(found.double(), exact, rtol=ROUND[dtype], atol=1e-5)


PALETTE = st.lists(st.sampled_from((-3.0, 2.0, 2.5, -float("inf"), float("inf"), float("nan"))), min_size=1, max_size=3)


@given(PALETTE, st.sampled_from((1, 15, 16, 17, 40, 70)), st.integers(0, 3), floats)
def test_the_largest_of_a_row_is_where_numpy_finds_it(
    kernels: Kernels, palette: list[float], size: int, pad: int, dtype: torch.dtype
) -> None:
    """The first of equal ones, and of what is not a number; in rows that lie apart."""
    kinds = torch.randint(len(palette), (20, size + pad), generator=torch.Generator().manual_seed(size))
    x = torch.tensor(palette)[kinds].to(dtype)[:, :size]
    found = kernels.argmax(x)
    assert found is not None
    assert found[1].tolist() == x.float().numpy().argmax(-1).tolist()
    torch.testing.assert_close(found[0], x.float().amax(-1), rtol=0, atol=0, equal_nan=True)


def test_an_engine_chooses_by_it_and_others_by_numpy(used: list[str]) -> None:
    logits = drawn(0, torch.bfloat16, 3, 40)
    with torch.inference_mode():
        found, wide = largest(logits), largest(logits.double())
    assert used == ["argmax", "argmax"] and torch.equal(found[1], wide[1])
    assert torch.equal(largest(logits)[1], wide[1]) and len(used) == 2


@given(st.integers(1, 200), floats)
def test_silu_is_the_formula_in_float64_to_the_rounding(kernels: Kernels, count: int, dtype: torch.dtype) -> None:
    x, y = 40 * drawn(count, dtype, count), torch.empty(count, dtype=dtype)
    kernels.table["silu"](dtype is torch.bfloat16, x.data_ptr(), y.data_ptr(), count)
    wide = x.double()
    torch.testing.assert_close(y.double(), wide / (1 + (-wide).exp()), rtol=ROUND[dtype] + 3e-7, atol=1e-30)


@given(st.integers(1, 200), floats, st.sampled_from(("silu", "gelu_tanh")))
def test_a_gate_in_one_pass_is_the_formula_rounded_twice(
    kernels: Kernels, count: int, dtype: torch.dtype, act: Activation
) -> None:
    gate, up = 12 * drawn(count, dtype, count), drawn(count + 1, dtype, count)
    found = kernels.gated(act, gate, up)
    assert found is not None
    stored = reference(act, gate.double()).to(dtype).double()
    torch.testing.assert_close(found.double(), stored * up.double(), rtol=2 * ROUND[dtype] + 4e-7, atol=1e-7)


def test_a_gate_of_what_is_not_finite_is_torchs(kernels: Kernels) -> None:
    gate = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 0.0, -200.0])
    for act in ("silu", "gelu_tanh"):
        found = kernels.gated(act, gate, torch.ones(7))
        torch.testing.assert_close(found, activate(act, gate), equal_nan=True, rtol=1e-6, atol=1e-30)
    assert kernels.gated("gelu", gate, gate) is None and kernels.gated("silu", gate, gate[:3]) is None


def test_a_gate_is_its_activation_times_the_rest(kernels: Kernels) -> None:
    """With the kernel and without one."""
    gate, up = drawn(0, torch.float32, 3, 50), drawn(1, torch.float32, 3, 50)
    for act in ("silu", "gelu_tanh", "gelu", "relu2"):
        with torch.inference_mode():
            torch.testing.assert_close(glu(act, gate, up), reference(act, gate) * up, rtol=1e-4, atol=1e-6)


def test_silu_joins_a_tape_only_with_torchs_bits(kernels: Kernels) -> None:
    """`agrees` against a loop over numbers of its own; a kernel that is off in one bit does not."""
    x = torch.cat([drawn(1, torch.float32, 1 << 14) * 30, torch.tensor([0.0, -0.0, 88.8, -88.8, 104.1, -104.1, 1e30])])
    for dtype in DTYPES:
        part = x.to(dtype)[: 1 << 14]
        mine = torch.empty_like(part)
        kernels.table["silu"](dtype is torch.bfloat16, part.data_ptr(), mine.data_ptr(), part.numel())
        assert agrees(kernels.table["silu"], dtype) == torch.equal(mine, torch.nn.functional.silu(part))

    class Off:
        def __call__(self, half: bool, x: int, y: int, count: int) -> None:
            kernels.table["silu"](half, x, y, count - 1)

    assert not agrees(Off(), torch.float32)  # type: ignore[arg-type]
