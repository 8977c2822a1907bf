"""Recurrences over the flat axis with a state for each sequence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from assay.ops.step import Step


def additive(
    q: Float[Tensor, "N H K"],
    k: Float[Tensor, "N H K"],
    v: Float[Tensor, "N H V"],
    past: Float[Tensor, "B H K V"],
    step: Step,
    keeps: bool,
) -> tuple[Float[Tensor, "N H V"], Float[Tensor, "B H K V"] | None]:
    """o_i = q_i (S_past + sum_{j <= i, same sequence} k_j v_j^T), and the state after each sequence where it is kept.

    Quadratic in the row: the masked product form (2006.16236, section 3.2). One token a sequence takes the recurrence.
    """
    high = past.dtype if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    qh, kh, vh, state = q.to(high), k.to(high), v.to(high), past.to(high)
    if step.grid is not None and step.grid[1] == 1 and step.past.shape[0] == step.tokens:
        end = state + kh[..., :, None] * vh[..., None, :]
        return torch.einsum("bhk,bhkv->bhv", qh, end).to(q.dtype), end if keeps else None
    rows, length = step.grid or (1, step.tokens)
    seq, index = step.seq.view(rows, length), step.index.view(rows, length)
    mask = (seq[:, :, None] == seq[:, None, :]) & (index[:, None, :] <= index[:, :, None]) & (seq >= 0)[:, :, None]
    qr, kr, vr = (t.view(rows, length, *t.shape[1:]).transpose(1, 2) for t in (qh, kh, vh))
    mix = ((qr @ kr.transpose(-1, -2)) * mask[:, None]) @ vr
    out = mix.transpose(1, 2).reshape(q.shape[0], *v.shape[1:])
    if not keeps:
        return out.to(q.dtype), None
    member = (step.seq[None, :] == torch.arange(state.shape[0], device=q.device)[:, None]).to(high)
    out = out + torch.einsum("bn,nhk,bhkv->nhv", member, qh, state)
    return out.to(q.dtype), state + torch.einsum("bn,nhk,nhv->bhkv", member, kh, vh)
