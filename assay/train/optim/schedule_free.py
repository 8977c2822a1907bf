"""Schedule-free AdamW: the average of the weights in the place of a schedule that ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from assay.train.optim.adamw import TRAINED
from assay.train.optim.base import ByWeight, Given
from assay.train.optim.specs import ScheduleFreeSpec
from assay.train.parallel.replicas import local


class ScheduleFree(ByWeight):
    """With z the fast weights, x their average and y = (1 - b1) z + b1 x, where the gradient is taken: the model has y
    and the state z, squares and the sum of squared rates, which weighs the average; x follows from both."""

    def __init__(self, spec: ScheduleFreeSpec, given: Given) -> None:
        super().__init__(spec, given.groups, given.team)
        self.spec = spec

    def move(self, name: str, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        step, (b1, b2), rate, y = self.counted(p), self.spec.betas, group["lr"], local(p)
        state = self.state[p]
        if step == 1:
            state["fast"] = p.detach().clone()
            state["rates"] = torch.zeros((), dtype=torch.float64)
        fast, (squares,) = local(state["fast"]), self.kept(p, "squares")
        squares.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        update = grad / ((squares / (1 - b2**step)).sqrt_() + self.spec.eps)
        update.add_(y, alpha=group["weight_decay"])
        state["rates"] += rate**2
        share = rate**2 / float(state["rates"])
        # x <- (1 - share) x + share (z - rate update), and y anew, without an x that is stored.
        y.lerp_(fast, share).add_(update, alpha=rate * (b1 * (1 - share) - 1))
        fast.add_(update, alpha=-rate)

    @torch.no_grad()
    def show(self) -> None:
        """The average into the model; what is trained is kept to the bit."""
        for p, state in self.state.items():
            state[TRAINED] = p.detach().clone()
            local(p).copy_(local(state["fast"]).lerp(local(p), 1 / self.spec.betas[0]))

    @torch.no_grad()
    def hide(self) -> None:
        for p, state in self.state.items():
            local(p).copy_(local(state.pop(TRAINED)))


def show(optimizer: torch.optim.Optimizer) -> None:
    """The weights that are to be evaluated and saved into the model, for good."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.show()


@contextmanager
def shown(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the model has the weights that are to be evaluated and saved; afterwards those that are trained."""
    if not isinstance(optimizer, ScheduleFree):
        yield
        return
    optimizer.show()
    try:
        yield
    finally:
        optimizer.hide()


def build(spec: ScheduleFreeSpec, given: Given) -> torch.optim.Optimizer:
    return ScheduleFree(spec, given)
