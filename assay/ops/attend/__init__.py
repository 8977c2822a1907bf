"""Attention over a view: one interface, several backends, the oracle first."""

from assay.ops.attend.api import attend, attend_lse, plan
from assay.ops.attend.blocks import Blocks, Runs, best, looked_into, runs
from assay.ops.attend.merge import merge
from assay.ops.attend.plan import BACKENDS, Plan, executed_pairs, materialised, narrowed
from assay.ops.attend.rule import Bias, DistanceBias, Scores

__all__ = [
    "BACKENDS", "Bias", "Blocks", "DistanceBias", "Plan", "Runs", "Scores", "attend", "attend_lse", "best",
    "executed_pairs", "looked_into", "materialised", "merge", "narrowed", "plan", "runs",
]  # fmt: skip
