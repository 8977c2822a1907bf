"""Groups of weights that an optimiser treats alike, from the declared weight table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from assay.spec.base import Weight

DECAYED = frozenset({"matrix", "expert", "head"})
"""Roles whose weights decay: the matrices of products. A vector (a gain, a bias) and a lookup table have no scale that
is free to shrink, and a row of a table would decay in every step, also where no token uses it."""


@dataclass(frozen=True)
class Group:
    """Parameters by dotted name, with or without weight decay."""

    decay: bool
    parameters: Mapping[str, nn.Parameter]


def groups(model: nn.Module, table: Mapping[str, Weight]) -> tuple[Group, ...]:
    """Every trainable parameter in exactly one group, in the model's order; empty groups are left out."""
    found: dict[bool, dict[str, nn.Parameter]] = {True: {}, False: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[table[name].role in DECAYED][name] = parameter
    return tuple(Group(decay, parameters) for decay, parameters in found.items() if parameters)
