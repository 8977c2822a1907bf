"""One block: a function of its arguments, and the unit of checkpointing, sharding and compilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from assay.ops.here import Here
from assay.ops.state import State
from assay.ops.step import Step
from assay.spec.base import Site
from assay.spec.model import StageSpec, branch_names


class Block(nn.Module):
    """`block(h, given, step, states) -> (h, given, taps)`; only the caches behind `states` change."""

    def __init__(self, stages: tuple[StageSpec, ...], site: Site) -> None:
        super().__init__()
        self.name, self.stages = site.name, stages
        self.names = tuple(branch_names(stages, i) for i in range(len(stages)))
        for number, stage in enumerate(stages):
            self.add_module(f"residual{number}", stage.residual.build(site.child(f"residual{number}")))
            if stage.pre is not None:
                self.add_module(f"norm{number}", stage.pre.build(site.child(f"norm{number}")))
            for name, branch in zip(self.names[number], stage.branches, strict=True):
                self.add_module(name, branch.part.build(site.child(name)))
                if branch.pre is not None:
                    self.add_module(f"{name}_norm", branch.pre.build(site.child(f"{name}_norm")))
                if branch.conv is not None:
                    self.add_module(f"{name}_conv", branch.conv.build(site.child(f"{name}_conv")))
                if branch.post is not None:
                    self.add_module(f"{name}_post", branch.post.build(site.child(f"{name}_post")))

    if TYPE_CHECKING:  # residuals, norms and branches are added by name

        def __getattr__(self, name: str) -> Any: ...

    def forward(
        self, h: Tensor, given: Mapping[str, Any], step: Step, states: Mapping[str, State], place: str | None = None
    ) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        taps: dict[str, Tensor] = {}
        values = dict(given)
        # A block tied to another by `like` has that block's weights and a state of its own: `place` is its own name.
        here = Here(place or self.name, states, values, taps, step.listen)
        h = here.tap("in", h)
        for number, stage in enumerate(self.stages):
            residual = getattr(self, f"residual{number}")
            h = residual.wrap(h, lambda x, n=number, s=stage: self._branches(x, n, s, step, here), step)
        return here.tap("out", h), values, taps

    def open(self, x: Tensor) -> Tensor:
        """The embedding becomes the residual stream, in the form this model's residuals carry."""
        return self.residual0.open(x)

    def close(self, h: Tensor) -> Tensor:
        return self.residual0.close(h)

    def _branches(self, x: Tensor, number: int, stage: StageSpec, step: Step, here: Here) -> Tensor:
        """The stage's branches on the stream x, summed."""
        if stage.pre is not None:
            x = getattr(self, f"norm{number}")(x, step)
        total: Tensor | None = None
        for name, branch in zip(self.names[number], stage.branches, strict=True):
            y = getattr(self, f"{name}_norm")(x, step) if branch.pre is not None else x
            y = getattr(self, f"{name}_conv")(y, step, here[f"{name}_conv"]) if branch.conv is not None else y
            y = getattr(self, name)(y, step, here[name])
            y = getattr(self, f"{name}_post")(y, step) if branch.post is not None else y
            y = y if branch.scale == 1.0 else y * branch.scale
            total = y if total is None else total + y
        assert total is not None
        return F.dropout(total, stage.dropout, self.training)
