"""Small machines and fleets for the tests of the simulator."""

from __future__ import annotations

from typing import Any

from assay.engine.scheduler import SchedulerConfig
from assay.simulate.cost import Machine, StepCost
from assay.simulate.fleet import ENDLESS, Fleet

GPU = StepCost(overhead=0.002, weights=0.009, token=3e-5, context=8e-8, pair=1e-9)


def machine(cost: StepCost = GPU, **fields: Any) -> Machine:
    return Machine(step=cost, **fields)


def fleet(policy: str = "chunked", budget: int = 512, running: int = 256, **fields: Any) -> Fleet:
    """budget: tokens of a step, and of a chunk."""
    config = {"policy": policy, "budget": budget, "chunk": budget, "max_running": running, "capacity": ENDLESS}
    extra = fields.pop("scheduler", {})
    return Fleet(scheduler=SchedulerConfig.model_validate({**config, **extra}), **fields)


def whole(**fields: Any) -> Fleet:
    """Whole prompts first, however long."""
    return fleet("prefill_first", 1 << 20, **fields)
