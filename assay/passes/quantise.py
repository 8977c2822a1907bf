"""Weights in 8 or 4 bits: what they are made of is changed, and the spec stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from assay.model.lm import LM
from assay.ops.packed import BITS, TILE, Packed, pack
from assay.parts.base import Embed, Head, Linear, Part

DTYPES: Mapping[str, int] = {f"int{bits}": bits for bits in BITS}
KEPT = ("routers", "selectors")
"""Slots whose maps decide where to look: a rounding there is no small error."""
TABLE = 8
"""Bits of what stands over the vocabulary, in either dtype: a rounding there meets every token's loss."""


def chosen(model: LM, bits: int) -> Iterator[tuple[nn.Module, str, int]]:
    """Modules, which of their parameters is packed, and in how many bits: the linear maps of the layers and the experts
    of mixtures in `bits`, the token table and the head's map in 8. Routers, selectors, maps of fewer than 16 outputs,
    norms, biases, position tables and what else parts own beside their linear maps (convolutions) stay as they are."""
    kept = within(model, lambda m: getattr(m.spec, "slot", "") in KEPT)
    heads = within(model, lambda m: isinstance(m, Head))
    for module in model.modules():
        if isinstance(module, Embed) and "weight" in module._parameters:
            yield module, "weight", TABLE
        elif isinstance(module, Linear):
            if module.weight.shape[0] >= TILE and module not in kept:
                yield module, "weight", TABLE if module in heads else bits
        elif isinstance(module, Part):
            for name, weight in module.spec.own(module.site).items():
                if weight.role == "expert" and len(weight.shape) == 3 and weight.shape[1] >= TILE:
                    yield module, name, bits


def within(model: LM, asked: Callable[[Part], bool]) -> set[nn.Module]:
    """All modules inside the parts of which this is true."""
    return {inner for m in model.modules() if isinstance(m, Part) and asked(m) for inner in m.modules()}


@torch.no_grad()
def quantise(model: LM, dtype: str) -> LM:
    """The same model, its weights in `dtype` (int8 or int4) in place of those it had, for inference only. What stays
    float keeps its dtype, which is that of activations and state too. ValueError for another dtype, and where there is
    nothing that could be packed."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; accepted: {', '.join(DTYPES)}")
    found = list(chosen(model, DTYPES[dtype]))
    if not found:
        raise ValueError(f"dtype: {dtype!r}: this model has no linear map of 16 outputs or more; accepted: f32, bf16")
    for module, name, bits in found:
        weight = module.get_parameter(name)
        if isinstance(weight, Packed):
            raise ValueError(f"dtype: {dtype!r}: these weights are packed already; accepted: float ones")
        setattr(module, name, nn.Parameter(pack(weight, bits), requires_grad=False))
    return model.requires_grad_(False).eval()
