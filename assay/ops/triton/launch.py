"""What a GPU has of the compiled kernels' names, and whether it is what torch computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops import packed as weights
from assay.ops.scan import delta
from assay.ops.state import Rows
from assay.ops.triton.attend import attend
from assay.ops.triton.packed import grouped, packed
from assay.ops.triton.scan import scan

NEAR = 1e-4  # of a result's norm: far above float32's rounding, far below a wrong number


class Walks:
    """The part of `Scans` that is here."""

    scan = staticmethod(scan)


class Launched:
    """Functions of the same names and meaning as those of `native.Kernels`; each answers None for what it does not
    serve."""

    attend = staticmethod(attend)
    packed = staticmethod(packed)
    grouped = staticmethod(grouped)

    def __init__(self) -> None:
        self.scans = Walks()

    def attend_tiled(self, *_: object) -> None:
        """Many queries a row are for torch's fused attention."""


def differs(device: torch.device) -> str | None:
    """Which kernel is not what torch says on a small problem, or None."""
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for name, pair in (("attend", _attention), ("packed", _products), ("scan", _recurrence)):
            found, expected = pair(draw, device)
            if found is None:
                return f"{name} does not serve"
            error = float((found.double() - expected.double()).norm() / expected.double().norm())
            if not error < NEAR:
                return f"{name} is off by {error:.1e} of its norm"
    return None


def _attention(draw: torch.Generator, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Two rows in pages, grouped heads of 20 and 24, more than one piece."""
    k, v = (torch.randn(19, 16, 1, size, generator=draw).to(device) for size in (20, 24))
    q, table = (
        torch.randn(2, 3, 20, generator=draw).to(device),
        torch.randperm(18, generator=draw).view(2, 9).to(device),
    )
    seen = (torch.rand(2, 144, generator=draw) < 0.5).to(device)
    found = attend(q, (k, v), seen, 0.2, table=table)
    keys, values = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))
    mask = seen[:, None, None]
    expected = F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, scale=0.2, enable_gqa=True)
    return found, expected[:, :, 0]


def _products(draw: torch.Generator, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Three rows of 70 with a matrix in 4 bits and one in 8."""
    x = torch.randn(3, 70, generator=draw).to(device)
    maps = [(weights.pack(torch.randn(20, 70, generator=draw).to(device), bits), None) for bits in (4, 8)]
    found = packed(x, maps)
    expected = torch.cat([weights.product(x, w) for w, _ in maps], 1)
    return None if found is None else torch.cat(found, 1), expected


def _recurrence(draw: torch.Generator, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Two tokens of a delta rule with a decay a head."""
    shape = (2, 2, 2)
    q, k, v = (torch.randn(*shape, size, generator=draw).to(device) for size in (5, 5, 7))
    beta, decay = (torch.rand(shape, generator=draw).to(device) for _ in range(2))
    updates, pool = delta.delta_rule(q, F.normalize(k, dim=-1), v, beta, -decay), v.new_ones(2, 2, 5, 7)
    found = scan(Rows(pool, torch.arange(2, device=device)), updates.streams(), updates.late)
    out, end = delta.recurrent(updates, pool)
    expected = torch.cat([out.flatten(), end.flatten()])
    return None if found is None else torch.cat([t.flatten() for t in found]), expected
