"""Attention in inference, by compiled kernels that read keys and values where they are stored: one query a sequence,
or on a CPU a chunk of them."""

from __future__ import annotations

from torch import Tensor

from assay.ops.attend.plan import Plan
from assay.ops.attend.rule import Scores
from assay.ops.native import serving, stepping
from assay.ops.step import InPages, View


def run(q: Tensor, view: View, scores: Scores, made: Plan | None) -> Tensor | None:
    """[N, H, V]; None where no kernel serves: rows that are not aligned, a bias, a mask for each head, ..."""
    if made is None or made.backend != "auto" or made.mask is None or made.mask.dim() != 3:
        return None
    layout, mask = view.layout, made.mask
    if not layout.aligned or mask.shape[0] != layout.seq.shape[0] or mask.shape[0] * mask.shape[1] != q.shape[0]:
        return None
    if scores.bias is not None or scores.dropout:
        return None
    alone = mask.shape[1] == 1
    native = stepping(q) if alone else serving(q)
    if native is None:
        return None
    kernel = native.attend if alone else native.attend_tiled
    rule = (mask[:, 0] if alone else mask, scores.scale, scores.softcap, scores.sink)
    if isinstance(view.fields, InPages):
        found = kernel(q, (view.fields.pools["k"], view.fields.pools["v"]), *rule, view.fields.table)
        if found is not None:
            return found
    return kernel(q, (view.dense("k"), view.dense("v")), *rule)
