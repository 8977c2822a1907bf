"""Kernels for a GPU that torch does not bring, named as the compiled ones. `ASSAY_NATIVE=0` switches them off.

They need the `triton` package (torch for CUDA brings it). They were run in Triton's interpreter and compiled for sm_90,
not run on hardware: so a process that meets a GPU first compares each with torch on a small problem, and goes without
them where one fails.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from assay.spec.environment import ENVIRONMENT

if TYPE_CHECKING:
    from assay.ops.triton.launch import Launched


@cache
def kernels(device: torch.device) -> Launched | None:
    """The kernels for this device; None without `triton`, and, said once, where they are not what torch says."""
    if not ENVIRONMENT.native or find_spec("triton") is None:
        return None
    from assay.ops.triton.launch import Launched, differs

    try:
        found = differs(device)
    except Exception as error:  # a compiler, a driver and a device that none of us has seen
        found = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if found is not None:
        print(f"assay: {device} without Triton's kernels, more slowly: {found}", file=sys.stderr, flush=True)
        return None
    return Launched()


def launched(x: Tensor) -> Launched | None:
    """The kernels, where x is a plain tensor on a GPU and nobody looks on: who traces, compiles or counts operations (a
    dispatch mode) sees torch's own."""
    if not x.is_cuda or type(x) is not Tensor or torch.compiler.is_compiling():
        return None
    return None if torch._C._len_torch_dispatch_stack() else kernels(x.device)
