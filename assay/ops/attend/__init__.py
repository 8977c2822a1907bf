"""Attention over a view: one interface, several backends, the oracle first."""

from assay.ops.attend.api import attend, attend_lse, plan
from assay.ops.attend.merge import merge
from assay.ops.attend.plan import BACKENDS, Plan, executed_pairs, materialised, narrowed
from assay.ops.attend.rule import Bias, DistanceBias, Scores

__all__ = [
    "BACKENDS", "Bias", "DistanceBias", "Plan", "Scores", "attend", "attend_lse", "executed_pairs", "materialised",
    "merge", "narrowed", "plan",
]  # fmt: skip
