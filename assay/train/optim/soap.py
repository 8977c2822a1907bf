"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.train.optim.base import ByWeight, Given
from assay.train.optim.specs import SoapSpec
from assay.train.parallel.replicas import local


def refreshed(p: Float[Tensor, "*batch n n"], basis: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """One power iteration from a basis towards the eigenvectors of p, made orthogonal again (algorithm 4)."""
    return torch.linalg.qr(p @ basis).Q


class Soap(ByWeight):
    """state: average, squares (in the basis, which they outlive when it turns), left and right preconditioners and
    their bases. The basis of a first step is that of its own gradient."""

    def __init__(self, spec: SoapSpec, given: Given) -> None:
        hidden, rest = given.split()
        super().__init__(spec, hidden, given.team, rest)
        self.spec = spec

    def move(self, name: str, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        step, (b1, b2), state = self.counted(p), self.spec.betas, self.state[p]
        if step == 1:
            self._begin(state, grad)
        left, right = state["left_basis"][0], state["right_basis"][0]
        average, squares = self.kept(p, "average", "squares")
        average.lerp_(grad, 1 - b1)
        squares.lerp_((left.mT @ grad @ right).square(), 1 - b2)
        turned = left.mT @ average @ right / (1 - b1**step)
        update = left @ (turned / ((squares / (1 - b2**step)).sqrt() + self.spec.eps)) @ right.mT
        weight, rate = local(p), group["lr"]
        weight.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)
        self._turn(state, grad, step)

    def _begin(self, state: dict[str, Tensor], grad: Tensor) -> None:
        for side, square in (("left", grad @ grad.mT), ("right", grad.mT @ grad)):
            state[side] = torch.zeros_like(square)[None]  # another number of dimensions: never cut
            # By row, as a save brings them back: LAPACK's are by column, whose products may round otherwise.
            state[f"{side}_basis"] = torch.linalg.eigh(square).eigenvectors.contiguous()[None]

    def _turn(self, state: dict[str, Tensor], grad: Tensor, step: int) -> None:
        for side, square in (("left", grad @ grad.mT), ("right", grad.mT @ grad)):
            state[side][0].lerp_(square, 1 - self.spec.side)
            if step % self.spec.every == 0:
                basis = state[f"{side}_basis"]
                basis.copy_(refreshed(state[side], basis))


def build(spec: SoapSpec, given: Given) -> torch.optim.Optimizer:
    return Soap(spec, given)
