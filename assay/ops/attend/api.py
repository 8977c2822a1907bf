"""`attend` and its plan: which backend serves a step is decided once, before the layers run.

Legend: N tokens, R x T rows and columns of the grid, S entries of the view, H query heads, G key heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from assay.ops.sees import Sees
from assay.ops.step import Layout, Step, View


class Bias(Protocol):
    """A position scheme's term in the attention scores."""

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """scores [..., H, T, S] plus the bias, for q [..., H, T, K] and places q_pos [..., T], k_pos [..., S]."""


@dataclass(frozen=True)
class Scores:
    """How q.k becomes a logit: times `scale`, soft-capped (cap * tanh(z / cap), Gemma 2), plus the bias; `sink` [H] is
    a learned logit without a value in every softmax (gpt-oss)."""

    scale: float
    softcap: float | None = None
    sink: Float[Tensor, "H"] | None = None
    bias: Bias | None = None

    def logits(self, raw: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """raw q.k [..., H, T, S] to logits before the mask."""
        z = raw * self.scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.bias is None else self.bias.tile(z, q, q_pos, k_pos)


@dataclass(frozen=True)
class Plan:
    """What a step's attention layers share: the backend and the mask it materialised ([R, T, S] or None)."""

    backend: str
    mask: Bool[Tensor, "R T S"] | None


def visible(step: Step, layout: Layout, sees: Sees) -> Bool[Tensor, "R T S"]:
    """Which entries each token sees. Aligned: rows of the grid against rows of the view; else all against all."""
    rows = layout.seq.shape[0] if layout.aligned else 1
    q_seq, q_index = (t.view(rows, -1, 1) for t in (step.seq, step.index))
    k_seq, k_index = (t.reshape(rows, 1, -1) for t in (layout.seq, layout.index))
    return (q_seq == k_seq) & (q_seq >= 0) & sees.visible(q_index, k_index)


def plan(step: Step, layout: Layout, sees: Sees, backend: str = "matmul") -> Plan:
    return Plan(backend, visible(step, layout, sees))


def attend(
    q: Float[Tensor, "N H K"], view: View, step: Step, sees: Sees, scores: Scores, made: Plan | None = None
) -> Float[Tensor, "N H V"]:
    """softmax(scores + mask) v for every token and head. A token that sees nothing gives 0."""
    made = made if made is not None else plan(step, view.layout, sees)
    assert made.mask is not None
    layout = view.layout
    k, v = view.dense("k"), view.dense("v")
    rows = made.mask.shape[0]
    k, v = (t.reshape(rows, -1, *t.shape[2:]).transpose(1, 2) for t in (k, v))  # [R, G, S, K]
    heads, groups = q.shape[1], k.shape[1]
    qr = q.view(rows, -1, heads, q.shape[-1]).transpose(1, 2)  # [R, H, T, K]
    raw = (qr.reshape(rows, groups, -1, q.shape[-1]) @ k.transpose(-1, -2)).view(rows, heads, qr.shape[2], -1)
    positions, places = step.positions.view(rows, -1), layout.positions.reshape(rows, -1)
    z = scores.logits(raw, qr, positions[:, None], places[:, None]).masked_fill(~made.mask[:, None], float("-inf"))
    p = softmax(z, scores.sink)
    out = p.view(rows, groups, -1, p.shape[-1]).to(v.dtype) @ v
    return out.view(rows, heads, -1, v.shape[-1]).transpose(1, 2).reshape(q.shape[0], heads, v.shape[-1])


def softmax(z: Float[Tensor, "R H T S"], sink: Float[Tensor, "H"] | None) -> Float[Tensor, "R H T S"]:
    """Over the last axis; a row that is masked everywhere gives zeros, and the sink takes its share and gives nothing."""
    top = z.amax(-1, keepdim=True)
    top = top if sink is None else torch.maximum(top, sink.to(z.dtype).view(1, -1, 1, 1))
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    e = torch.exp(z - top)
    total = e.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink.to(z.dtype).view(1, -1, 1, 1) - top)
    return e / torch.where(total > 0, total, torch.ones_like(total))
