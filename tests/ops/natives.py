"""What the tests of the compiled kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# Of a sum of n products: float32 rounds each, bfloat16 the result once.
ROUND = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def drawn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
