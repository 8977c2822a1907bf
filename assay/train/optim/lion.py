"""Lion: the sign of an average of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.train.optim.base import ByWeight, Given
from assay.train.optim.specs import LionSpec
from assay.train.parallel.replicas import local


class Lion(ByWeight):
    """state: momentum. The sign is taken of one average of it and the gradient, and it is kept by a slower one."""

    def __init__(self, spec: LionSpec, given: Given) -> None:
        super().__init__(spec, given.groups, given.team)
        self.betas = spec.betas

    def move(self, name: str, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        (momentum,) = self.kept(p, "momentum")
        update = momentum.lerp(grad, 1 - self.betas[0]).sign_()
        weight, rate = local(p), group["lr"]
        weight.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)
        momentum.lerp_(grad, 1 - self.betas[1])


def build(spec: LionSpec, given: Given) -> torch.optim.Optimizer:
    return Lion(spec, given)
