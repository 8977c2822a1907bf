"""How much of the machine's arithmetic a training run uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import torch

from assay.model.lm import weight_table
from assay.spec.base import Weight
from assay.spec.model import ModelSpec
from assay.train.precision import native_bfloat16

SIZE = 2048


def train_flops_per_token(spec: ModelSpec, length: int, table: Mapping[str, Weight] | None = None) -> float:
    """6 x parameters + 12 x layers x d_model x length (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Parameters without those of the position schemes, an expert's times the share of tokens it sees; full pairs of
    tokens, as others report it. Forward and backward; recomputation does not count.
    """
    table = weight_table(spec) if table is None else table
    used = sum(w.numel * w.active for name, w in table.items() if not name.startswith("positions."))
    return 6 * used + 12 * spec.layers * spec.d_model * length


@cache
def matmul_flop_s(kind: str) -> float:
    """The rate of a square matrix product of 2048 on a device of this kind (cpu, cuda, mps), measured once.

    In bfloat16, or in float32 where bfloat16 products are emulated: the faster of what the machine offers.
    """
    dtype = torch.bfloat16 if native_bfloat16(kind) else torch.float32
    a, b = (torch.randn(SIZE, SIZE, device=kind).to(dtype) for _ in range(2))
    return 2 * SIZE**3 / min(_seconds(a, b, kind) for _ in range(4))


def _seconds(a: torch.Tensor, b: torch.Tensor, kind: str) -> float:
    _wait(kind)
    start = time.perf_counter()
    a @ b
    _wait(kind)
    return time.perf_counter() - start


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()
