"""How much of the machine's arithmetic a training run uses."""

from __future__ import annotations

from collections.abc import Mapping

from assay.model.lm import weight_table
from assay.spec.base import Weight
from assay.spec.model import ModelSpec


def train_flops_per_token(spec: ModelSpec, length: int, table: Mapping[str, Weight] | None = None) -> float:
    """6 x parameters + 12 x layers x d_model x length (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    Parameters without those of the position schemes, an expert's times the share of tokens it sees; full pairs of
    tokens, as others report it. Forward and backward; recomputation does not count. Of an encoder-decoder each side is
    taken to read half of a row, so that a token meets half of the parameters, and half of a row at most.
    """
    table = weight_table(spec) if table is None else table
    used = sum(w.numel * w.active for name, w in table.items() if not name.startswith("positions."))
    if spec.encoder is not None:
        own, read = spec.layers * spec.d_model, spec.encoder.layers * spec.encoder.d_model
        return 3 * used + 3 * (2 * own + read) * length
    return 6 * used + 12 * spec.layers * spec.d_model * length
