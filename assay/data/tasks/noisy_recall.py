"""Noisy recall: in-context recall with pairs of noise in between.

Poli et al. 2024 (MAD), arXiv 2403.17844, appendix B.1: a fifth of the pairs is noise, from 16 symbols of its own. What
a layer writes must depend on what it reads: gated states (Mamba, gated linear attention) and attention are expected to
win, states that decay at a fixed rate to forget.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from assay.data.tasks._recall import Recall


class NoisyRecall(Recall):
    """`noise`: the share of pairs that are two of `noise_symbols` instead."""

    kind: Literal["noisy_recall"] = "noisy_recall"
    noise: float = Field(0.2, ge=0, lt=1)
    noise_symbols: int = Field(16, ge=1)

    @property
    def share(self) -> float:
        return self.noise

    @property
    def others(self) -> int:
        return self.noise_symbols
