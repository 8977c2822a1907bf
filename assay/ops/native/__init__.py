"""Compiled kernels for a CPU: for the few rows of a decode step, and some that train as well (recurrences, short
convolutions, norms, RoPE, cross-entropy). `ASSAY_NATIVE=0` switches them off."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.ops.native.build import Unbuildable, library
from assay.ops.native.kernels import Kernels
from assay.ops.tape import recorder
from assay.ops.triton import launched
from assay.spec.environment import ENVIRONMENT

if TYPE_CHECKING:
    from assay.ops.triton.launch import Launched

PLAIN = (Tensor, torch.nn.Parameter)


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled by the first call where this machine has none yet; None, said once, where it cannot."""
    if not ENVIRONMENT.native:
        return None
    try:
        return Kernels(library())
    except (Unbuildable, OSError, AttributeError) as error:
        print(f"assay: without compiled kernels, more slowly: {error}", file=sys.stderr, flush=True)
        return None


def unwatched(x: Tensor) -> bool:
    """A plain tensor on a CPU, and nobody looking on: who traces, compiles or counts operations (a dispatch mode) sees
    torch's own. A tape's recorder writes kernels down."""
    plain = type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()
    return plain and (not torch._C._len_torch_dispatch_stack() or recorder() is not None)


def rounding(x: Tensor) -> Kernels | Launched | None:
    """The kernels, or a GPU's, for products that have no gradient: unwatched."""
    return kernels() if unwatched(x) else launched(x)


def serving(x: Tensor) -> Kernels | None:
    """The kernels, where they may stand in for torch: unwatched in inference mode."""
    # In this order: what is being compiled may not be asked about inference mode.
    return kernels() if unwatched(x) and torch.is_inference_mode_enabled() else None


def training(*given: Tensor, half: bool = False) -> Kernels | None:
    """As `serving`, with gradients or without: of kernels that have their gradients' beside them, for plain float32;
    half: or bfloat16."""
    taken = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    if torch.compiler.is_compiling() or any(type(t) not in PLAIN or t.dtype not in taken for t in given):
        return None
    return kernels() if unwatched(given[0]) else None


def stepping(x: Tensor) -> Kernels | Launched | None:
    """As `serving`, or a GPU's: of what reads a cache or carries a state."""
    if not x.is_cuda:
        return serving(x)
    return launched(x) if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() else None


__all__ = ["Kernels", "Unbuildable", "kernels", "library", "rounding", "serving", "stepping", "training", "unwatched"]
