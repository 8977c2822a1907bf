"""Compiled kernels for the few rows of a decode step on a CPU. `ASSAY_NATIVE=0` switches them off."""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

from assay.ops.native.build import Unbuildable, library
from assay.ops.native.kernels import Kernels
from assay.spec.environment import ENVIRONMENT


@cache
def kernels() -> Kernels | None:
    """The kernels, compiled by the first call where this machine has none yet; None, said once, where it cannot."""
    if not ENVIRONMENT.native:
        return None
    try:
        return Kernels(library())
    except (Unbuildable, OSError, AttributeError) as error:
        print(f"assay: decoding without compiled kernels, more slowly: {error}", file=sys.stderr, flush=True)
        return None


def serving(x: Tensor) -> Kernels | None:
    """The kernels, where they may stand in for torch: inference mode, a plain tensor on a CPU, nobody looking on.

    Who traces, compiles or counts operations (a dispatch mode) sees torch's own.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or type(x) is not Tensor:
        return None
    return kernels() if x.is_cpu and not torch._C._len_torch_dispatch_stack() else None


__all__ = ["Kernels", "Unbuildable", "kernels", "library", "serving"]
