"""Joining attention over parts of the keys (split-KV, ring attention, shared prefixes)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Part = tuple[Float[Tensor, "*tokens V"], Float[Tensor, "*tokens"]]


def merge(a: Part, b: Part) -> Part:
    """(output, log-sum-exp) of attention over disjoint sets of keys to that over both; commutative, and associative up
    to rounding. A part that saw nothing (0, -inf) is neutral. Dao et al. 2022, arXiv 2205.14135, section 3.1."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    some = total > 0
    total = torch.where(some, total, torch.ones_like(total))
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, torch.where(some, top + torch.log(total), torch.full_like(top, float("-inf")))
