"""Attention over a view: one interface, several backends, the oracle first."""

from assay.ops.attend.api import attend, attend_lse, logits, plan
from assay.ops.attend.blocks import (
    Blocks,
    Runs,
    best,
    choices,
    chosen,
    entered,
    gathers,
    looked_into,
    opened,
    products,
    runs,
    within,
)
from assay.ops.attend.merge import merge
from assay.ops.attend.plan import BACKENDS, Plan, aligned, executed_pairs, materialised, narrowed
from assay.ops.attend.rule import Bias, DistanceBias, Scores, softmax

__all__ = [
    "BACKENDS", "Bias", "Blocks", "DistanceBias", "Plan", "Runs", "Scores", "aligned", "attend", "attend_lse", "best",
    "choices", "chosen", "entered", "executed_pairs", "gathers", "logits", "looked_into", "materialised", "merge",
    "narrowed", "opened", "plan", "products", "runs", "softmax", "within",
]  # fmt: skip
