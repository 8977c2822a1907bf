"""An exponential moving average of the weights, kept beside them: often a better model than the last one.

Polyak and Juditsky 1992; of language models, Hägele et al. 2024, arXiv 2405.18392, section 4. The average after step t
is the mean of the weights after each step 1 .. t, weighted by decay^(t - step): the bias of a start at zero is taken
out as Adam does (Kingma and Ba 2015, arXiv 1412.6980, section 3), so that a short run need not forget its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

PREFIX = "ema/"
FOLDER = "ema"
"""In a run's folder: a checkpoint of the average."""


class Average:
    """The average of these parameters. It holds as much memory as they do, in their dtype."""

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        self.decay, self.steps = decay, 0
        self._live = dict(parameters)
        self._mean = {name: torch.zeros_like(p, requires_grad=False) for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count in the weights as they are after a step."""
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.steps)
        for name, p in self._live.items():
            self._mean[name].lerp_(p.detach(), share)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within, the parameters are the average; afterwards what is trained, to the bit. Before the first step there
        is none, and they stay."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._live.items() if self.steps else ():
            held = p.detach().clone()
            p.copy_(self._mean[name])
            self._mean[name] = held

    def state(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": mean for name, mean in self._mean.items()}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on where `state` was taken. KeyError names what is missing."""
        self.steps = steps
        for name, mean in self._mean.items():
            mean.copy_(tensors[f"{PREFIX}{name}"])


def average_of(decay: float | None, parameters: Mapping[str, Tensor], cuts: bool, own: bool) -> Average | None:
    """The average that a recipe asks for. ValueError where processes hold parts of weights (`cuts`), and for an
    optimiser that keeps an average of its `own`."""
    if decay is None:
        return None
    if cuts:
        raise ValueError(
            f"recipe.evaluation.ema: {decay}; this plan cuts the weights over processes, and the average is of whole "
            "ones: accepted with recipe.parallel.data alone, or without it"
        )
    if own:
        raise ValueError(f"recipe.evaluation.ema: {decay}; this optimiser averages the weights itself: leave it out")
    return Average(decay, parameters)
