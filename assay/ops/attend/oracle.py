"""The definition: one token and one head at a time, in float64. Vaswani et al. 2017, arXiv 1706.03762, equation 1."""

from __future__ import annotations

import torch
from torch import Tensor

from assay.ops.attend.call import Call


def refuses(call: Call) -> str | None:
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """[R, T, H, V] and the log-sum-exp [R, T, H]; every option of `Scores`, every layout."""
    rows, tokens = call.q.shape[:2]
    kept = call.survivors()
    made = [[_token(call, r, t, kept) for t in range(tokens)] for r in range(rows)]
    out = torch.stack([torch.stack([o for o, _ in row]) for row in made])
    return out.to(call.v.dtype), torch.stack([torch.stack([lse for _, lse in row]) for row in made])


def _token(call: Call, r: int, t: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """[H, V] and [H] of one token."""
    q, k, v, rule = call.q[r, t].double(), call.k[r].double(), call.v[r].double(), call.scores
    heads, group = q.shape[0], q.shape[0] // k.shape[1]
    z = torch.stack([k[:, h // group] @ q[h] * rule.scale for h in range(heads)])  # [H, S]
    if rule.softcap is not None:
        z = rule.softcap * torch.tanh(z / rule.softcap)
    if rule.bias is not None:
        q_pos, k_pos = call.positions(slice(t, t + 1), slice(None))
        z = rule.bias.tile(z[:, None], q[:, None], q_pos[r], k_pos[r])[:, 0]
    keys = call.visible(slice(t, t + 1), slice(None))[r, 0].nonzero()[:, 0]
    found = []
    for h in range(heads):
        p, lse = _head(z[h, keys], None if rule.sink is None else rule.sink[h])
        p = p if kept is None else p * kept[r, h, t, keys] / (1 - rule.dropout)
        found.append((p @ v[keys, h // group], lse))
    return torch.stack([o for o, _ in found]), torch.stack([lse for _, lse in found])


def _head(z: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities [S] of the visible keys and their log-sum-exp, from their logits [S]."""
    logits = z if sink is None else torch.cat([z, sink.double()[None]])
    if logits.shape[0] == 0:
        return z, logits.new_full((), float("-inf"))
    return torch.softmax(logits, 0)[: z.shape[0]], torch.logsumexp(logits, 0)
