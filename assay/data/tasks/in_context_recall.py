"""In-context recall: keys and values in turn; a key that was seen before has the value it had.

Poli et al. 2024 (MAD), arXiv 2403.17844, appendix B.1: 16 symbols, rows of 128, every repeated key asked. Attention and
linear states with a short convolution or a delta rule are expected to win: eight pairs fit into small states.
"""

from __future__ import annotations

from typing import Literal

from assay.data.tasks._recall import Recall


class InContextRecall(Recall):
    """Pairs, and nothing between them."""

    kind: Literal["in_context_recall"] = "in_context_recall"
