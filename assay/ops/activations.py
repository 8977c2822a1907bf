"""Pointwise nonlinearities by name."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"]


def activate(name: Activation, x: Tensor) -> Tensor:
    """relu2 is relu(x)^2 (Primer, 2109.08668); gelu is x * Phi(x), gelu_tanh its tanh form (Hendrycks, 1606.08415)."""
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
