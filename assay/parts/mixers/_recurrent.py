"""What mixers with a state for each sequence share."""

from __future__ import annotations

from assay.ops.lanes import Lanes, lanes
from assay.ops.state import State
from assay.ops.step import Step
from assay.parts.base import Mixer


class Recurrent(Mixer):
    """A mixer that runs over lanes: `step.table(self)` is the step's `Lanes`, made once for all of them."""

    def prepare_key(self) -> object:
        return Lanes

    def prepare(self, step: Step, state: State | None) -> Lanes:
        assert state is not None
        return lanes(step, state.keeps)
