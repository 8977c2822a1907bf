"""The law of parallel training: what ranks make of their pieces, summed, is the whole: outputs and all gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from assay.conform.cases import Case, Refusal, close
from assay.ops.state import Stateless
from assay.parts.cut import cut, whole
from assay.spec.shard import Cut, cut_fields, cut_weights, fits

MOST = 4
"""Ranks that are tried: each number up to it that deals the part out evenly."""


def law_sharding(c: Case) -> None:
    """A part that declares `pieces` for `tensor`, cut by its table: outputs, the gradient of the input and those of
    weights that are whole on every rank are the sums over ranks; those of cut weights are the ranks' side by side,
    summed over the ranks that hold copies of one piece."""
    if c.slot not in ("mixers", "ffns"):
        return
    count = c.spec.pieces(c.site).get("tensor")
    if not count:
        raise Refusal("it is whole on every rank" if count == 0 else "it declares no pieces for `tensor`")
    x, y, grads = _run([c], c, 1)
    for ranks in (n for n in range(2, MOST + 1) if fits(c.spec, c.site, "tensor", n)):
        cuts = cut_weights(c.spec, c.site, "tensor", ranks)
        assert cuts, "`pieces` names tensor, but no weight says `split`"
        cases = [_piece(c, cuts, rank, ranks) for rank in range(ranks)]
        mine_x, mine_y, mine = _run(cases, c, ranks)
        close(mine_y, y, f"the sum of {ranks} ranks")
        close(mine_x, x, f"the gradient of the input, {ranks} ranks")
        for name, [want] in grads.items():
            close(_joined(mine[name], cuts.get(name)), want, f"gradient of {name}, {ranks} ranks")


def _joined(grads: list[Tensor], how: Cut | None) -> Tensor:
    if how is None:
        return torch.stack(grads).sum(0)
    summed = [torch.stack(grads[i : i + how.copies]).sum(0) for i in range(0, len(grads), how.copies)]
    return whole(summed, replace(how, copies=1))


def _run(cases: list[Case], like: Case, ranks: int) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
    """Gradient of the input, summed outputs, and each rank's gradients by name."""
    x, step = like.noise((12, like.site.d_in), 1).requires_grad_(), like.step(2, 6)
    total = torch.stack([c.run(x, step, _states(c, ranks)) for c in cases]).sum(0)
    (total * like.noise(tuple(total.shape), 2)).sum().backward()
    assert x.grad is not None
    named = [dict(c.part.named_parameters()) for c in cases]
    return x.grad, total, {n: [_grad(p[n]) for p in named] for n, p in named[0].items() if p.requires_grad}


def _grad(p: Tensor) -> Tensor:
    found, p.grad = p.grad, None
    return torch.zeros_like(p) if found is None else found


def _piece(c: Case, cuts: Mapping[str, Cut], rank: int, ranks: int) -> Case:
    piece = copy.deepcopy(c)
    cut(piece.part, cuts, rank, ranks)
    return piece


def _states(c: Case, ranks: int) -> dict[str, Stateless]:
    few = {c.site.name: c.spec.copied(c.site)}
    return {n: Stateless(cut_fields(fs, ranks, few.get(n, {})), torch.float64, c.device) for n, fs in c.fields.items()}
