"""Adafactor: second moments of a matrix by its rows and columns alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from assay.train.optim.base import ByWeight, Given
from assay.train.optim.specs import AdafactorSpec
from assay.train.parallel.replicas import local


class Adafactor(ByWeight):
    """state: rows and columns, the averages of squared gradients along the last two dimensions, flat and whole on every
    process; of a vector `squares`, cut as it is.

    Root mean squares are the whole weight's, so its parts are put together for a step: two gathers a weight.
    """

    def __init__(self, spec: AdafactorSpec, given: Given) -> None:
        super().__init__(spec, given.groups, given.team)
        self.spec = spec

    def move(self, name: str, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        step, weight, rate, dims = self.counted(p), local(p), group["lr"], p.dim()
        whole = self.team.assembled(name, grad, dims)
        before = self.team.assembled(name, weight, dims)
        scale = max(self.spec.floor, _rms(before)) * min(rate, step**-0.5)
        weight.mul_(1 - rate * group["weight_decay"])
        tiny = torch.finfo(p.dtype).eps
        squares = self._squares(name, p, whole, step**-self.spec.decay, tiny)
        update = squares.clamp(min=tiny**2).rsqrt() * whole
        update *= scale / max(1.0, _rms(update) / self.spec.clip)
        weight.sub_(self.team.piece(name, update, dims))

    def _squares(self, name: str, p: Tensor, grad: Tensor, share: float, tiny: float) -> Tensor:
        """The estimate of the squared gradient, in the gradient's shape."""
        if p.dim() < 2:
            (squares,) = self.kept(p, "squares")
            squares.lerp_(self.team.piece(name, grad, 1).square(), share)
            return self.team.assembled(name, squares, 1)
        state, squared = self.state[p], grad.square()
        for key, dim in (("rows", -1), ("columns", -2)):
            mean = squared.mean(dim)
            if key not in state:
                state[key] = mean.new_zeros(mean.numel())  # one dimension: never cut
            state[key].view_as(mean).lerp_(mean, share)
        rows = state["rows"].view(grad.shape[:-1])
        columns = state["columns"].view(*grad.shape[:-2], grad.shape[-1])
        return (rows / rows.mean(-1, keepdim=True).clamp(min=tiny))[..., None] * columns[..., None, :]


def _rms(x: Tensor) -> float:
    return float(x.norm()) / x.numel() ** 0.5


def build(spec: AdafactorSpec, given: Given) -> torch.optim.Optimizer:
    return Adafactor(spec, given)
