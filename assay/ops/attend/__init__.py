"""Attention over a view: one interface, several backends, the oracle first."""

from assay.ops.attend.api import Bias, Plan, Scores, attend, plan

__all__ = ["Bias", "Plan", "Scores", "attend", "plan"]
