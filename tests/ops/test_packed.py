"""Weights of 8 and 4 bits: what they stand for, their product against float64 and itself, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, dequantize, quantize
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from assay.ops import native, packed
from assay.ops.grouped import grouped
from assay.ops.linear import linear, linears
from assay.ops.native import Kernels
from assay.ops.packed import BITS, Packed, held_bytes, pack, packed_bytes
from tests.ops.natives import DTYPES, ROUND, as_compiled_for, drawn

bits = st.sampled_from(BITS)


def laid_out(w: Packed) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [N, G], read byte by byte from the description of the layout."""
    groups, held = -(-w.width // 32), w.codes
    codes, scales = torch.zeros(w.out, w.width), torch.zeros(w.out, groups)
    begin = -(-groups * 32 // 64) * 64
    for n in range(w.out):
        tile, lane = held[n // 16], n % 16
        for g in range(groups):
            at = (g * 16 + lane) * 2
            scales[n, g] = tile[at : at + 2].clone().view(torch.bfloat16)[0]
        for k in range(w.width):
            g, i = divmod(k, 32)
            first = begin + g * 64 * w.bits + lane * 4 + i % 4
            if w.bits == 8:
                codes[n, k] = int(tile[first + i // 4 * 64]) - 128
            else:
                byte = int(tile[first + i % 16 // 4 * 64])
                codes[n, k] = (byte & 15 if i < 16 else byte >> 4) - 8
    return codes, scales


@given(st.integers(1, 40), st.integers(1, 70), bits)
def test_the_bytes_are_where_the_layout_says(out: int, size: int, bits: int) -> None:
    w = drawn(0, torch.float32, out, size)
    found = pack(w, bits)
    codes, scales = laid_out(found)
    assert held_bytes(found) == packed_bytes(out, size, bits)
    assert torch.equal(found.values_(), codes * scales.repeat_interleave(32, 1)[:, :size])


@given(st.integers(1, 20), st.integers(1, 70), st.sampled_from((1e-30, 1.0, 1e30)))
def test_eight_bits_are_within_half_a_level(out: int, size: int, scale: float) -> None:
    w = drawn(0, torch.float32, out, size) * scale
    groups = F.pad(w, (0, -size % 32)).unflatten(1, (-1, 32))
    # The scale is rounded to 8 bits, so that the largest value may be cut by as much.
    level = groups.abs().amax(-1, keepdim=True) * (1 + 2.0**-8) / 127
    error = F.pad(pack(w, 8).values_() - w, (0, -size % 32)).unflatten(1, (-1, 32)).abs()
    assert (error <= level * (0.5 + 127 * 2.0**-8)).all()


def test_four_bits_are_as_near_as_q4_0() -> None:
    w = drawn(0, torch.float32, 64, 256)
    theirs = torch.from_numpy(dequantize(quantize(w.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0))
    mine = pack(w, 4).values_()
    # Scales of 8 bits beside theirs of 11.
    assert (mine - w).square().mean() < 1.01 * (theirs - w).square().mean()
    assert (mine - theirs).square().mean() < 0.06 * (theirs - w).square().mean()
    coarse = torch.randint(-7, 8, (32, 64), generator=torch.Generator().manual_seed(0)) * 0.25
    coarse[:, ::32] = -2.0  # the level that the scale is of
    assert torch.equal(pack(coarse, 4).values_(), coarse)


def expected(x: Tensor, w: Packed) -> Tensor:
    """In float64, from the description: rows in groups of 32 that are rounded to 127ths of their largest."""
    codes, scales = laid_out(w)
    total = torch.zeros(x.shape[0], w.out, dtype=torch.float64)
    for g in range(scales.shape[1]):
        part = x[:, 32 * g : 32 * g + 32].double()
        most = part.abs().amax(1, keepdim=True).clamp(min=1e-30)
        whole = (part * (127 / most.float()).double()).round()
        sums = whole @ codes[:, 32 * g : 32 * g + 32].double().T
        total += sums * (most.float() / 127).double() * scales[:, g].double()
    return total


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 50), bits, st.sampled_from(DTYPES), st.booleans())
def test_the_product_is_that_of_rounded_rows_and_torch_has_its_bits(
    kernels: Kernels, rows: int, size: int, out: int, bits: int, dtype: torch.dtype, biased: bool
) -> None:
    x, w = drawn(0, dtype, rows, size), pack(drawn(1, torch.float32, out, size), bits)
    b = drawn(2, dtype, out) if biased else None
    found = kernels.packed(x, [(w, b)])
    assert found is not None and found[0].dtype == dtype
    exact = expected(x, w) + (0 if b is None else b.double())
    terms = x.double().abs() @ w.values_().double().abs().T + 1
    slack = ROUND[dtype] * exact.abs() + 8 * ROUND[torch.float32] * terms
    assert ((found[0].double() - exact).abs() <= slack).all()
    plain = packed.product(x, w)
    assert torch.equal(found[0], (plain if b is None else plain + b.float()).to(dtype))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 60), bits, st.integers(1, 3))
def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads(
    kernels: Kernels, rows: int, size: int, out: int, bits: int, threads: int
) -> None:
    x, w = drawn(0, torch.float32, rows, size), pack(drawn(1, torch.float32, out, size), bits)
    alone = torch.cat([y[0] for i in range(rows) if (y := kernels.packed(x[i : i + 1], [(w, None)])) is not None])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = kernels.packed(x, [(w, None), (w, None)])
    finally:
        torch.set_num_threads(before)
    assert together is not None and all(torch.equal(y, alone) for y in together)


@pytest.mark.parametrize("bits", BITS)
def test_the_product_is_near_that_of_the_values(bits: int) -> None:
    """Rows lose half a 127th of the largest of 32 values at most."""
    x, w = drawn(0, torch.float32, 9, 160), pack(drawn(1, torch.float32, 33, 160), bits)
    lost = x.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1) / 254
    bound = lost.double() @ w.values_().double().abs().T * (1 + 1e-5)
    assert ((linear(x, w).double() - x.double() @ w.values_().double().T).abs() <= bound).all()


@pytest.mark.parametrize("bits", BITS)
def test_several_maps_are_each_as_if_alone(used: list[str], bits: int) -> None:
    x = drawn(0, torch.float32, 5, 48)
    floats = [(drawn(i, torch.float32, n, 48), b) for i, (n, b) in enumerate([(40, None), (7, torch.ones(7))])]
    for maps in (floats, [(pack(w, bits), b) for w, b in floats], [floats[0], (pack(floats[1][0], bits), None)]):
        with torch.inference_mode():
            for found, (w, b) in zip(linears(x, maps), maps, strict=True):
                assert torch.equal(found, linear(x, w, b))
    assert used[:3] == ["linears", "linear", "linear"] and "packed" in used


@settings(phases=(Phase.explicit, Phase.generate))
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 70), st.integers(1, 40), bits, st.booleans())
def test_an_experts_rows_have_the_bits_of_a_product_with_its_matrix(
    kernels: Kernels, counts: list[int], size: int, out: int, bits: int, compiled: bool
) -> None:
    x, w = drawn(0, torch.float32, sum(counts), size), drawn(1, torch.float32, len(counts), out, size)
    several = pack(w, bits)
    assert several.shape == w.shape and held_bytes(several) == len(counts) * packed_bytes(out, size, bits)
    told = torch.tensor(counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: kernels if compiled else None)
        found = grouped(x, several, told)
    for y, rows, one in zip(found.split(counts), x.split(counts), w, strict=True):
        assert torch.equal(y, packed.product(rows, pack(one, bits)))
    assert torch.equal(several.values_()[0], pack(w[0], bits).values_())


@pytest.mark.parametrize("bits", BITS)
def test_it_is_a_parameter_that_is_looked_up_in_and_whose_values_others_see(bits: int) -> None:
    w = pack(drawn(0, torch.float32, 21, 40), bits)
    kept = nn.Parameter(w, requires_grad=False)
    assert isinstance(kept, Packed) and isinstance(kept, nn.Parameter) and kept.shape == (21, 40)
    ids = torch.tensor([[20, 0], [16, 15]])
    assert torch.equal(F.embedding(ids, kept), w.values_()[ids])
    assert torch.equal(kept.T @ torch.eye(21), w.values_().T) and torch.equal(kept[3:5], w.values_()[3:5])
    assert torch.equal(F.linear(torch.ones(3, 40), kept), linear(torch.ones(3, 40), w))
    low = kept.to(torch.bfloat16)
    assert isinstance(low, Packed) and low.dtype == torch.bfloat16 and torch.equal(low.codes, w.codes)
    assert torch.equal(F.embedding(ids, low), w.values_()[ids].bfloat16())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("several", [False, True])
def test_it_stays_packed_wherever_it_is_moved_in_inference_mode_too(bits: int, several: bool) -> None:
    w = pack(drawn(0, torch.float32, *((3, 21, 40) if several else (21, 40))), bits)
    other = torch.zeros(1, dtype=torch.bfloat16)
    moves: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.to("meta"),
        lambda t: t.to(device="cpu", dtype=torch.bfloat16),
        lambda t: t.to(torch.float64),
        lambda t: t.to(other),
        Tensor.cpu,
        Tensor.bfloat16,
        Tensor.clone,
        Tensor.detach,
        lambda t: nn.Parameter(t, requires_grad=False),
        lambda t: nn.ParameterList([t]).to("meta")[0],
    ]
    for number, move in enumerate(moves):
        outside = move(w)
        with torch.inference_mode():
            found = move(w)
        plain = move(w.values_())
        for one in (outside, found):
            assert isinstance(one, Packed), number
            assert (one.dtype, one.device, one.shape) == (plain.dtype, plain.device, plain.shape), number
            assert one.codes.device == plain.device and (one.is_meta or torch.equal(one.codes, w.codes)), number


@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_a_number_stays_visible_and_nothing_stays_nothing(kernels: Kernels, bits: int) -> None:
    w = pack(drawn(1, torch.float32, 20, 64), bits)
    x = torch.ones(5, 64)
    x[1, 3], x[2, 40], x[3] = float("nan"), float("-inf"), 1e-40
    for found in (kernels.packed(x, [(w, None)]), [packed.product(x, w)]):
        assert found is not None
        assert found[0][1:3].isnan().all() and (found[0][3] == 0).all() and found[0][[0, 4]].isfinite().all()


def test_refusals() -> None:
    w = pack(torch.ones(4, 8), 8)
    with pytest.raises(ValueError, match="5 bits; accepted: 8, 4"):
        pack(torch.ones(4, 8), 5)
    with pytest.raises(ValueError, match="not finite"):
        pack(torch.tensor([[float("nan")]]), 8)
    with pytest.raises(ValueError, match="8 bits have no gradient"):
        linear(torch.ones(2, 8, requires_grad=True), w)
    with pytest.raises(ValueError, match="8 bits have no gradient"):
        grouped(torch.ones(2, 8, requires_grad=True), pack(torch.ones(1, 4, 8), 8), torch.tensor([2]))
    with pytest.raises(TypeError, match="not written to"):
        w.zero_()


def test_who_counts_sees_torch(used: list[str]) -> None:
    x, w = drawn(0, torch.float32, 3, 64), pack(drawn(1, torch.float32, 16, 64), 4)
    with FlopCounterMode(display=False) as counter:
        counted = linear(x, w)
    assert used == [] and counter.get_total_flops() == 2 * 3 * 64 * 16
    assert torch.equal(linear(x, w), counted) and used == ["packed"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2", False), reason="no AVX2 to run it on")
def test_narrower_registers_have_the_same_bits(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = as_compiled_for("haswell", tmp_path, monkeypatch)
    for bits in BITS:
        for rows, size, out in ((1, 32, 16), (3, 70, 33), (9, 160, 40)):
            maps = [(pack(drawn(1, torch.float32, out, size) * 50, bits), drawn(2, torch.float32, out))]
            x = drawn(0, torch.float32, rows, size)
            one, other = kernels.packed(x, maps), narrow.packed(x, maps)
            assert one is not None and other is not None and torch.equal(one[0], other[0])
