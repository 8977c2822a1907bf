"""Entries of token fields in 8, 4 or 2 bits with a scale and a zero for each group: pure functions on whole pages.

A group is quantised asymmetrically, x ~ zero + scale * code with code in 0 .. 2^bits - 1 (KIVI, Liu et al. 2024, arXiv
2402.02750, section 3; KVQuant, Hooper et al. 2024, arXiv 2401.18079). Keys have channels that are large for every
token, so a group of theirs runs along the tokens of one channel (`channel`); values have none, and a group runs along
the channels of one token (`token`), so that a token's error is its own.

Legend: T tokens of a page, G heads (or any dimensions before the last), D channels, E = ceil(D * bits / 8) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from assay.cache.formats import Format

SCALES = torch.float16  # of scale and zero; bfloat16's 8 bits would widen a group that is far from 0


@dataclass(frozen=True)
class Packed:
    """Quantised pages, with any dimensions before those of a page: codes [..., T, G, E], scale and zero as
    `Format.scales_shape`."""

    codes: UInt8[Tensor, "..."]
    scale: Float[Tensor, "..."]
    zero: Float[Tensor, "..."]


def quantise(pages: Float[Tensor, "..."], form: Format, dims: int = 3) -> Packed:
    """Pages [..., T, G, D], a page being the last `dims` dimensions.

    Scale and zero are rounded outwards, so every value stays between the first and the last code and is off by at most
    half its scale. Values beyond float16's 65504 have no zero and become NaN.
    """
    work = torch.promote_types(pages.dtype, torch.float32)
    groups, axis = _grouped(pages.to(work), form, dims)
    top = (1 << form.bits) - 1
    low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    zero = _rounded_down(low)
    scale = -_rounded_down((zero.to(work) - high) / top)
    width = scale.to(work)
    code = ((groups - zero.to(work)) / torch.where(width == 0, torch.ones_like(width), width)).round_()
    codes = code.nan_to_num_(0).clamp_(0, top).to(torch.uint8).reshape(pages.shape)
    return Packed(pack(codes, form.bits), scale.squeeze(axis), zero.squeeze(axis))


def dequantise(packed: Packed, form: Format, channels: int, dtype: torch.dtype, dims: int = 3) -> Tensor:
    """[..., T, G, D] of `channels` channels in `dtype`."""
    work = torch.promote_types(dtype, torch.float32)
    codes = unpack(packed.codes, form.bits, channels)
    shape = codes.shape
    page = len(shape) - dims
    if form.axis == "channel":
        axis = page + 1
        codes = codes.unflatten(page, (packed.scale.shape[page], -1))
    else:
        axis = len(shape)
        codes = codes.unflatten(-1, (packed.scale.shape[-1], -1))
    values = codes.to(work) * packed.scale.to(work).unsqueeze(axis) + packed.zero.to(work).unsqueeze(axis)
    return values.reshape(shape).to(dtype)


def pack(codes: UInt8[Tensor, "... D"], bits: int) -> UInt8[Tensor, "... E"]:
    """8 / bits codes a byte, the first in the lowest bits; the last byte is filled up with 0."""
    each = 8 // bits
    if each == 1:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << (place * bits)
    return packed


def unpack(packed: UInt8[Tensor, "... E"], bits: int, channels: int) -> UInt8[Tensor, "... D"]:
    each, top = 8 // bits, (1 << bits) - 1
    if each == 1:
        return packed
    parts = [(packed >> (place * bits)) & top for place in range(each)]
    return torch.stack(parts, -1).flatten(-2)[..., :channels]


def _grouped(pages: Tensor, form: Format, dims: int) -> tuple[Tensor, int]:
    """The groups on a dimension of their own, and which one that is."""
    page = pages.ndim - dims
    group = form.run(tuple(pages.shape[page:]))
    if form.axis == "channel":
        return pages.unflatten(page, (-1, group)), page + 1
    return pages.unflatten(-1, (-1, group)), pages.ndim


def _rounded_down(x: Tensor) -> Tensor:
    """The largest number of `SCALES` that is not above x."""
    near = x.to(SCALES)
    bits = near.view(torch.int16)
    lowest = torch.full_like(bits, -32767)  # the negative number next to 0
    below = torch.where(near > 0, bits - 1, torch.where(near == 0, lowest, bits + 1)).view(SCALES)
    return torch.where(near.to(x.dtype) > x, below, near)
