"""Initial weights: every draw is keyed by (seed, weight name), so adding a module moves no other draw."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from assay.spec.base import Init, Weight


def draw(init: Init, shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """A float32 tensor drawn from this init by a generator of its own."""
    if init.kind == "constant":
        return torch.full(shape, init.value)
    if init.kind == "ramp":
        rise = torch.linspace(0.0, 1.0, shape[-1]) ** init.power
        return linked(init, init.low + (init.high - init.low) * rise).expand(shape).clone()
    if init.kind == "tiled":
        values = torch.tensor(init.values, dtype=torch.float32)
        return values[torch.arange(shape[-1]) % len(values)].expand(shape).clone()
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    if init.kind == "normal":
        return torch.empty(shape).normal_(0.0, init.std, generator=generator)
    if init.kind == "uniform":
        return torch.empty(shape).uniform_(-init.std, init.std, generator=generator)
    logs = init.kind == "log_between"
    low, high = (math.log(init.low), math.log(init.high)) if logs else (init.low, init.high)
    x = torch.empty(shape).uniform_(low, high, generator=generator)
    return linked(init, x.exp() if logs else x)


def linked(init: Init, x: Tensor) -> Tensor:
    """The parameter whose meaning is x. softplus(p) = x at p = x + log(1 - e^-x), which holds for small x too."""
    if init.link == "log":
        return x.log()
    if init.link == "softplus":
        return x + torch.log(-torch.expm1(-x))
    return x.logit() if init.link == "sigmoid" else x


@torch.no_grad()
def initialise(module: nn.Module, table: dict[str, Weight], seed: int) -> None:
    """Fill every parameter from the declared table; a parameter the table does not name is our bug."""
    parameters = dict(module.named_parameters())  # a block shared by `like` once, as the table has it
    missing = parameters.keys() ^ table.keys()
    assert not missing, f"declared and built weights differ: {sorted(missing)[:6]}"
    for name, weight in table.items():
        assert parameters[name].shape == weight.shape, f"{name}: {parameters[name].shape} != {weight.shape}"
        parameters[name].copy_(draw(weight.init, weight.shape, seed, name))
