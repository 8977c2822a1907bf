"""Pointwise nonlinearities by name."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops.native import serving

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"]


ALONE = 16_384
"""Values that torch leaves to one thread: gelu shares out more than these, others more than twice as many."""


def activate(name: Activation, x: Tensor) -> Tensor:
    """relu2 is relu(x)^2 (Primer, 2109.08668); gelu is x * Phi(x), gelu_tanh its tanh form (Hendrycks, 1606.08415).

    torch computes the last few values of each thread's share by another formula, an ulp apart. In inference under
    deterministic algorithms it is therefore given as much at once as one thread does.
    """
    if torch.are_deterministic_algorithms_enabled() and torch.is_inference_mode_enabled() and x.numel() > ALONE:
        return torch.cat([_activate(name, piece) for piece in x.reshape(-1).split(ALONE)]).view(x.shape)
    return _activate(name, x)


def glu(name: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """activate(name, gate) * up, of one shape. In inference on a CPU one pass of a compiled kernel where it has the
    nonlinearity: a value's bits do not depend on those beside it."""
    native = serving(gate)
    found = None if native is None else native.gated(name, gate, up)
    return activate(name, gate) * up if found is None else found


def _activate(name: Activation, x: Tensor) -> Tensor:
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def reference(name: Activation, x: Tensor) -> Tensor:
    """The same from the formulas, for a float64 tensor."""
    if name in ("relu", "relu2"):
        positive = torch.where(x > 0, x, torch.zeros_like(x))
        return positive * positive if name == "relu2" else positive
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
