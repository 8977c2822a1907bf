"""Half precision where sums are made."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def high(x: Tensor) -> Tensor:
    """bfloat16 and float16 to float32; everything else as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has products of bfloat16. oneDNN says yes to every CPU with AVX-512 and emulates them where they
    are missing."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
