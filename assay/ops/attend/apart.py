"""A view of which this process holds a part: what attention over all of it asks of whoever moves the parts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from assay.ops.attend.plan import Plan
from assay.ops.attend.rule import Scores
from assay.ops.sees import Sees
from assay.ops.step import Step, View


@dataclass(frozen=True)
class Apart(View):
    """Fields are all there is, and are put together when one is read."""

    def attended(
        self, q: Float[Tensor, "N H K"], step: Step, sees: Sees, scores: Scores, made: Plan | None
    ) -> Float[Tensor, "N H V"] | None:
        """Attention over all entries, a part at a time; None where that needs all of them at once."""
        raise NotImplementedError
