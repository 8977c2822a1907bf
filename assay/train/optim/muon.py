"""Muon: momentum whose singular values are made equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from assay.train.optim.base import ByWeight, Given, Moving
from assay.train.optim.specs import MuonSpec
from assay.train.parallel.replicas import local

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of p(s) = a s + b s^3 + c s^5, which takes singular values in (0, 1] near 1 in few steps, and not to it."""
SCALE = 0.2
"""The root mean square of AdamW's updates, about."""


def orthogonal(x: Float[Tensor, "*batch r c"], steps: int) -> Float[Tensor, "*batch r c"]:
    """Nearly U V^T of x = U S V^T: `steps` of X <- a X + (b A + c A A) X with A = X X^T, from x over its norm."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(ByWeight):
    """state: momentum, cut as the weight is. Whole matrices are dealt out to the processes: each works out its share of
    the updates (`parallel.dealt`)."""

    def __init__(self, spec: MuonSpec, given: Given) -> None:
        hidden, rest = given.split()
        super().__init__(spec, hidden, given.team, rest)
        self.spec = spec

    def advance(self, weights: Sequence[Moving]) -> None:
        ahead = {name: self.ahead(p, grad) for name, p, grad, _ in weights}
        updates = self.team.dealt(ahead, self.update)
        for name, p, _, group in weights:
            rate = group["lr"]
            local(p).mul_(1 - rate * group["weight_decay"]).add_(updates[name], alpha=-rate)

    def ahead(self, p: Tensor, grad: Tensor) -> Tensor:
        """The momentum after this gradient, and the gradient once more (Nesterov)."""
        (momentum,) = self.kept(p, "momentum")
        momentum.lerp_(grad, 1 - self.spec.momentum)
        return grad.lerp(momentum, self.spec.momentum)

    def update(self, whole: Float[Tensor, "*batch r c"]) -> Float[Tensor, "*batch r c"]:
        return SCALE * math.sqrt(max(whole.shape[-2:])) * orthogonal(whole, self.spec.steps)


def build(spec: MuonSpec, given: Given) -> torch.optim.Optimizer:
    return Muon(spec, given)
