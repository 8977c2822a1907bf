"""Half precision where sums are made."""

from __future__ import annotations

import torch
from torch import Tensor


def high(x: Tensor) -> Tensor:
    """bfloat16 and float16 to float32; everything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
