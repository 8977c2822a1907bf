"""Attention of one query a row with the keys and values of the blocks that it chose: nothing else of them is read.

Legend: R rows, S entries of the view, s of them looked up, H query heads, G key heads, B = R times the heads that
choose for themselves, P query heads that share a choice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.attend.plan import Plan
from assay.ops.attend.rule import Scores, softmax
from assay.ops.step import InPages, View


def run(q: Float[Tensor, "R H K"], view: View, scores: Scores, made: Plan | None) -> Float[Tensor, "R H V"] | None:
    """None where the plan looks nothing up, or where gradients or a bias are wanted: other backends have these."""
    layout = view.layout
    if made is None or made.backend != "auto" or not made.by_head or made.parts is None:
        return None
    if not layout.aligned or layout.seq.shape[0] != q.shape[0] or torch.is_grad_enabled():
        return None
    if scores.bias is not None or scores.dropout:
        return None
    (part,), (rows, heads, size) = made.parts, q.shape
    high = torch.promote_types(q.dtype, torch.float32)
    k, v = (entries(view, name, part.k).to(high) for name in "kv")
    z = scores.capped(torch.bmm(q.to(high).reshape(len(k), -1, size), k.transpose(1, 2)))
    if part.mask is not None:
        z = z.masked_fill(~part.mask[0], float("-inf"))
    p = softmax(z.view(rows, heads, 1, -1), scores.sink).view_as(z)
    return torch.bmm(p, v).view(rows, heads, -1).to(q.dtype)


def entries(view: View, name: str, at: Int[Tensor, "B s"]) -> Float[Tensor, "B s K"]:
    """Keys or values of a field [R, S, G, K] at numbers (row * G + group) * S + entry, from pages where they stand."""
    pages = view.fields if isinstance(view.fields, InPages) else None
    stored = view.dense(name) if pages is None else pages.pools[name]
    groups, length = stored.shape[2], view.layout.seq.shape[1]
    head, entry = at // length, at % length
    row, group = head // groups, head % groups
    if pages is None:
        entry = row * length + entry
    else:
        page, table = stored.shape[1], pages.table
        number = table.flatten().index_select(0, (row * table.shape[1] + entry // page).flatten()).view(at.shape)
        entry = number * page + entry % page
    found = stored.reshape(-1, stored.shape[-1]).index_select(0, (entry * groups + group).flatten())
    return found.view(*at.shape, -1)
