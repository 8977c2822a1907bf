"""The optimiser that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import nn

from assay.spec.base import Weight
from assay.train.optim.base import Given
from assay.train.optim.groups import groups
from assay.train.optim.specs import OptimizerSpec
from assay.train.parallel.team import Team


def build(spec: OptimizerSpec, model: nn.Module, table: Mapping[str, Weight], team: Team) -> torch.optim.Optimizer:
    """ValueError, by name, for an axis of the team's mesh that cannot hold it."""
    spec.check(team.mesh.spec.sizes)
    made: torch.optim.Optimizer = import_module(f"assay.train.optim.{spec.kind}").build(
        spec, Given(groups(model, table), table, team)
    )
    return made
