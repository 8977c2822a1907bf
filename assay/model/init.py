"""Initial weights: every draw is keyed by (seed, weight name), so adding a module moves no other draw."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from assay.spec.base import Init, Weight


def draw(init: Init, shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """A float32 tensor drawn from this init by a generator of its own."""
    if init.kind == "constant":
        return torch.full(shape, init.value)
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    if init.kind == "normal":
        return torch.empty(shape).normal_(0.0, init.std, generator=generator)
    return torch.empty(shape).uniform_(-init.std, init.std, generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, table: dict[str, Weight], seed: int) -> None:
    """Fill every parameter from the declared table; a parameter the table does not name is our bug."""
    parameters = dict(module.named_parameters())  # a block shared by `like` once, as the table has it
    missing = parameters.keys() ^ table.keys()
    assert not missing, f"declared and built weights differ: {sorted(missing)[:6]}"
    for name, weight in table.items():
        assert parameters[name].shape == weight.shape, f"{name}: {parameters[name].shape} != {weight.shape}"
        parameters[name].copy_(draw(weight.init, weight.shape, seed, name))
