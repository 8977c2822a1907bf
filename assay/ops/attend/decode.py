"""Decoding on a CPU: one query a sequence, by a compiled kernel that reads keys and values where they are stored."""

from __future__ import annotations

from torch import Tensor

from assay.ops.attend.plan import Plan
from assay.ops.attend.rule import Scores
from assay.ops.native import serving
from assay.ops.step import InPages, View


def run(q: Tensor, view: View, scores: Scores, made: Plan | None) -> Tensor | None:
    """[N, H, V]; None where the kernel does not serve: more than a query a row, a bias, a mask for each head, ..."""
    if made is None or made.backend != "auto" or made.mask is None or made.mask.dim() != 3:
        return None
    layout, mask = view.layout, made.mask
    if not layout.aligned or mask.shape[1] != 1 or mask.shape[0] != q.shape[0] or layout.seq.shape[0] != q.shape[0]:
        return None
    native = None if scores.bias is not None or scores.dropout else serving(q)
    if native is None:
        return None
    rule = (mask[:, 0], scores.scale, scores.softcap, scores.sink)
    if isinstance(view.fields, InPages):
        found = native.attend(q, (view.fields.pools["k"], view.fields.pools["v"]), *rule, view.fields.table)
        if found is not None:
            return found
    return native.attend(q, (view.dense("k"), view.dense("v")), *rule)
