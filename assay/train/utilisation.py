"""How much of the machine's arithmetic a training run uses."""

from __future__ import annotations

from collections.abc import Mapping

from assay.model.lm import weight_table
from assay.spec.base import Weight
from assay.spec.model import ModelSpec


def train_flops_per_token(spec: ModelSpec, length: int, table: Mapping[str, Weight] | None = None) -> float:
    """6 x parameters + 12 x layers x d_model x length (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Parameters without those of the position schemes, an expert's times the share of tokens it sees; full pairs of
    tokens, as others report it. Forward and backward; recomputation does not count.
    """
    table = weight_table(spec) if table is None else table
    used = sum(w.numel * w.active for name, w in table.items() if not name.startswith("positions."))
    return 6 * used + 12 * spec.layers * spec.d_model * length
