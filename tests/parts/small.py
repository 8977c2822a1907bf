"""One part in float64 with random weights, run on rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from assay.conform.cases import Case, case, noise
from assay.conform.stored import feed, open_cache
from assay.ops.step import Step, rows_step
from assay.spec import registry

D = 32


def part(slot: str, kind: str, **fields: Any) -> Case:
    return case(registry.get(slot, kind).model_validate({"kind": kind, **fields}))


def rows(n: int, length: int, **more: Any) -> Step:
    return rows_step(torch.zeros(n, length, dtype=torch.long), horizon=64, **more)


def x(n: int = 12, seed: int = 1) -> Tensor:
    return noise((n, D), seed)


@torch.no_grad()
def put(c: Case, **values: Tensor) -> None:
    """Set parameters by name, `__` for a dot."""
    for name, value in values.items():
        c.part.get_parameter(name.replace("__", ".")).copy_(value)


def stored(c: Case, tokens: Tensor, chunks: tuple[int, ...]) -> Tensor:
    """One sequence [T, D] in chunks, against a cache."""
    c.modules.eval()
    cache, slots = open_cache(c, 1, max(chunks))
    pieces, past = [], 0
    for size in chunks:
        pieces.append(feed(c, cache, slots, tokens[None, past : past + size], past)[0])
        past += size
    return torch.cat(pieces)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))
