"""Quantised pages against loops in float64, the error bound, and bytes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache.formats import Format
from assay.cache.quantised import Packed, dequantise, pack, quantise, unpack

FORMATS = [f"int{bits}/{axis}" for bits in (8, 4, 2) for axis in ("channel", "token", "channel:2", "token:5")]


def page(seed: int, tokens: int = 6, heads: int = 2, channels: int = 10, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, heads, channels)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * torch.rand(shape, generator=generator) + shift


def below(x: float) -> np.float16:
    near = np.float16(x)
    return near if float(near) <= x else np.nextafter(near, np.float16(-np.inf))


def reference(x: Tensor, bits: int, axis: str, group: int) -> tuple[np.ndarray, dict[tuple[int, ...], float]]:
    """Value by value: what comes back, and the scale of every value."""
    tokens, heads, channels = x.shape
    out, scales = np.zeros(x.shape), {}
    for h in range(heads):
        lines = range(channels) if axis == "channel" else range(tokens)
        for line in lines:
            for first in range(0, tokens if axis == "channel" else channels, group):
                places = [(i, h, line) if axis == "channel" else (line, h, i) for i in range(first, first + group)]
                values = [float(x[p]) for p in places]
                zero = float(below(min(values)))
                scale = -float(below((zero - max(values)) / (2**bits - 1)))
                for p, value in zip(places, values, strict=True):
                    code = round((value - zero) / scale) if scale else 0
                    assert 0 <= code < 2**bits
                    out[p], scales[p] = zero + scale * code, scale
    return out, scales


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shift", [0.0, 7.3, -40.0])
def test_equals_the_loops(name: str, shift: float) -> None:
    form, x = Format.parse(name), page(1, shift=shift)
    expected, scales = reference(x, form.bits, form.axis, form.run(tuple(x.shape)))
    got = dequantise(quantise(x, form), form, x.shape[-1], torch.float64)
    assert torch.allclose(got, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert max(abs(float(got[p] - x[p])) / scale for p, scale in scales.items()) <= 0.5 + 1e-9


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-6e4, 6e4, width=32), min_size=24, max_size=24),
    name=st.sampled_from(["int8/channel", "int4/token", "int2/channel:2", "int4/token:3", "int2/token"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_off_by_at_most_half_a_scale(values: list[float], name: str, dtype: torch.dtype) -> None:
    """Whatever the values: tiny, equal, far from zero, of both signs. float32 adds its own rounding and
    underflow."""
    form, x = Format.parse(name), torch.tensor(values, dtype=dtype).view(4, 1, 6)
    packed = quantise(x, form)
    back = dequantise(packed, form, 6, dtype)
    group = form.run((4, 1, 6))
    scale = packed.scale.double().repeat_interleave(group, 0 if form.axis == "channel" else 2)
    slack = 2.0**-22 * x.double().abs() + 1e-4 * scale + 1e-40 if dtype == torch.float32 else 1e-12 * (1 + x.abs())
    assert bool(((back.double() - x.double()).abs() <= scale / 2 + slack).all())
    width = (x.amax() - x.amin()).double() + 2.0**-10 * x.abs().amax().double() + 1e-6
    assert bool((packed.scale.double() * ((1 << form.bits) - 1) <= 1.01 * width + 1e-4).all()), "scales are no larger"


@given(st.lists(st.integers(0, 255), min_size=1, max_size=13), st.sampled_from([8, 4, 2]))
def test_packing_by_hand(codes: list[int], bits: int) -> None:
    """The codes as one number in base 2^bits, written in little-endian bytes."""
    codes = [c % (1 << bits) for c in codes]
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    number = sum(c << (i * bits) for i, c in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(math.ceil(len(codes) * bits / 8), "little")
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_the_tensors(name: str) -> None:
    form, x = Format.parse(name), page(0).float()
    packed = quantise(x, form)
    assert packed.codes.shape == form.codes_shape(x.shape) and packed.scale.shape == form.scales_shape(x.shape)
    held = sum(t.numel() * t.element_size() for t in (packed.codes, packed.scale, packed.zero))
    per_line = {"channel": (1, 20), "channel:2": (3, 20), "token": (12, 1), "token:5": (12, 2)}[name.split("/")[1]]
    by_hand = 12 * math.ceil(10 * form.bits / 8) + 4 * per_line[0] * per_line[1]
    assert held == form.bytes(tuple(x.shape)) == by_hand


@pytest.mark.parametrize("name", FORMATS)
def test_pages_do_not_touch_each_other(name: str) -> None:
    """Many pages at once, as in a batch, are each page alone."""
    form, pages = Format.parse(name), torch.stack([page(i) for i in range(6)]).view(2, 3, 6, 2, 10).float()
    both = quantise(pages, form)
    for i in range(2):
        for j in range(3):
            one = quantise(pages[i, j], form)
            assert torch.equal(one.codes, both.codes[i, j])
            assert torch.equal(one.scale, both.scale[i, j]) and torch.equal(one.zero, both.zero[i, j])
            back = dequantise(Packed(both.codes[i, j], both.scale[i, j], both.zero[i, j]), form, 10, torch.float32)
            assert torch.equal(back, dequantise(both, form, 10, torch.float32)[i, j])


def test_a_constant_group_is_exact_where_float16_is() -> None:
    for name in FORMATS:
        form, x = Format.parse(name), torch.full((6, 2, 10), -2.5)
        assert torch.equal(dequantise(quantise(x, form), form, 10, torch.float32), x)


def test_values_out_of_range_are_not_hidden() -> None:
    form, x = Format.parse("int8/token"), torch.zeros(1, 1, 4)
    for value in (float("nan"), float("inf"), -float("inf"), -1e6, 1e9):
        x[0, 0, 1] = value
        assert not bool(dequantise(quantise(x, form), form, 4, torch.float32).isfinite().all()), value


def others(x: Tensor, name: str) -> float:
    """Relative mean squared error on the channels that are not large."""
    form = Format.parse(name)
    error = (dequantise(quantise(x, form), form, x.shape[-1], x.dtype) - x)[..., 4:]
    return float(error.square().mean() / x[..., 4:].square().mean())


@pytest.mark.parametrize(("bits", "token", "channel", "groups"), [(4, 0.19, 0.016, 0.006), (2, 5.3, 0.40, 0.15)])
def test_large_channels_ask_for_groups_along_tokens(bits: int, token: float, channel: float, groups: float) -> None:
    """4 of 64 channels are ten times as large, 1024 normal tokens. A token's one scale is theirs, and the other
    channels pay; a channel's own scale is not, and less so in groups of 32 tokens."""
    x = torch.randn(1024, 1, 64, generator=torch.Generator().manual_seed(0))
    x[..., :4] *= 10
    measured = [others(x, f"int{bits}/{axis}") for axis in ("token", "channel", "channel:32")]
    assert measured == pytest.approx([token, channel, groups], rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3/token", "'int3/token'; accepted: bf16, f16, or int8, int4 or int2"),
        ("int4", "accepted"),
        ("int4/head", "accepted"),
        ("int4/token:0", "accepted"),
        ("int4/token:3x", "accepted"),
    ],
)
def test_unknown_formats_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format.parse(text)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4 do not divide the 6 tokens"):
        quantise(page(0), Format.parse("int4/channel:4"))
    with pytest.raises(ValueError, match="groups of 3 do not divide the 10 channels"):
        quantise(page(0), Format.parse("int4/token:3"))
    assert str(Format.parse("int4/token:3")) == "int4/token:3" and str(Format.parse("int2/channel")) == "int2/channel"
