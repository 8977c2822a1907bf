"""What the tests of the compiled kernels share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from assay.ops.native import Kernels, build

DTYPES = (torch.float32, torch.bfloat16)
# Of a sum of n products: float32 rounds each, bfloat16 the result once.
ROUND = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def drawn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_compiled_for(machine: str, place: Path, patch: pytest.MonkeyPatch) -> Kernels:
    """The kernels with the registers of another machine, which this one must have too."""
    patch.setattr(build, "FLAGS", tuple(f.replace("-march=native", f"-march={machine}") for f in build.FLAGS))
    return Kernels(build.library(place / machine))
