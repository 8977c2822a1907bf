"""The hand-written backward of RMSNorm against torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from assay.ops.norm import rms_norm


@given(rows=st.integers(1, 7), size=st.integers(1, 19), weighted=st.booleans(), seed=st.integers(0, 99))
def test_equals_torch_in_value_and_gradients(rows: int, size: int, weighted: bool, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(2, rows, size, generator=make, dtype=torch.float64) for _ in range(2))
    w = torch.randn(size, generator=make, dtype=torch.float64) if weighted else None
    found = []
    for norm in (rms_norm, lambda a, b, eps: F.rms_norm(a, (size,), b, eps)):
        leaves = [x.clone().requires_grad_()] + ([w.clone().requires_grad_()] if w is not None else [])
        y = norm(leaves[0], leaves[1] if weighted else None, 1e-3)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
