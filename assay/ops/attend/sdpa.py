"""torch's own fused attention, where the scores are plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from assay.ops.attend.call import Call
from assay.ops.attend.plan import by_head


def refuses(call: Call) -> str | None:
    """Why this call cannot be served, or None."""
    rule = call.scores
    named = (("softcap", rule.softcap), ("sink", rule.sink), ("bias", rule.bias))
    given = [name for name, value in named if value is not None]
    if given:
        return f"scaled_dot_product_attention has no {' and no '.join(given)}"
    if rule.dropout and call.step.part is not None:
        return "scaled_dot_product_attention draws its dropout for the rows that it is given"
    return None


def run(call: Call) -> tuple[Tensor, None]:
    """[R, T, H, V]; it keeps the log-sum-exp to itself, and draws a dropout of its own."""
    call = call if call.plan.lower else call.masked()
    plan, groups = call.plan, call.k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    mask = None
    if not plan.causal:
        assert plan.mask is not None
        # A row without a key is undefined there, forward or backward: it sees everything here, and is zeroed after.
        mask = by_head(plan.mask, q.shape[1])
        mask = mask if plan.dead is None else mask | plan.dead[:, None, :, None]
    gqa, scale, drop = q.shape[1] != groups, call.scores.scale, call.scores.dropout
    out = F.scaled_dot_product_attention(q, k, v, mask, drop, mask is None, scale=scale, enable_gqa=gqa)
    out = out.transpose(1, 2)
    return out if plan.dead is None else out.masked_fill(plan.dead[:, :, None, None], 0.0), None
