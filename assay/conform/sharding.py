"""The law of parallel training: what ranks make of their pieces, summed, is the whole: outputs and all gradients."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from assay.conform.cases import Case, Refusal, close
from assay.ops.state import Stateless
from assay.parts.cut import cut
from assay.spec.shard import cut_fields, cut_weights

MOST = 4
"""Ranks that are tried: each number up to it that deals the part out evenly."""


def law_sharding(c: Case) -> None:
    """A part that declares `pieces` for `tensor`, cut by its table: outputs, the gradient of the input and those of
    weights that are whole on every rank are the sums over ranks; those of cut weights are the ranks' side by side."""
    if c.slot not in ("mixers", "ffns"):
        return
    count = c.spec.pieces(c.site).get("tensor")
    if not count:
        raise Refusal("it is whole on every rank" if count == 0 else "it declares no pieces for `tensor`")
    dims = cut_weights(c.spec, c.site, "tensor")
    assert dims, "`pieces` names tensor, but no weight says `split`"
    x, y, grads = _run([c], c)
    for ranks in (n for n in range(2, MOST + 1) if count % n == 0):
        cases = [_piece(c, dims, rank, ranks) for rank in range(ranks)]
        mine_x, mine_y, mine = _run(cases, c)
        close(mine_y, y, f"the sum of {ranks} ranks")
        close(mine_x, x, f"the gradient of the input, {ranks} ranks")
        for name, [whole] in grads.items():
            found = torch.cat(mine[name], dims[name]) if name in dims else torch.stack(mine[name]).sum(0)
            close(found, whole, f"gradient of {name}, {ranks} ranks")


def _run(cases: list[Case], like: Case) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Gradient of the input, summed outputs, and each rank's gradients by name."""
    x, step = like.noise((12, like.site.d_in), 1).requires_grad_(), like.step(2, 6)
    total = torch.stack([c.run(x, step, _states(c, len(cases))) for c in cases]).sum(0)
    (total * like.noise(tuple(total.shape), 2)).sum().backward()
    assert x.grad is not None
    named = [dict(c.part.named_parameters()) for c in cases]
    return x.grad, total, {n: [_grad(p[n]) for p in named] for n, p in named[0].items() if p.requires_grad}


def _grad(p: Tensor) -> Tensor:
    found, p.grad = p.grad, None
    return torch.zeros_like(p) if found is None else found


def _piece(c: Case, dims: dict[str, int], rank: int, ranks: int) -> Case:
    piece = copy.deepcopy(c)
    cut(piece.part, dims, rank, ranks)
    return piece


def _states(c: Case, ranks: int) -> dict[str, Stateless]:
    return {n: Stateless(cut_fields(fs, ranks), torch.float64, c.device) for n, fs in c.fields.items()}
