"""How a vocabulary's rows lie: whole on one process, or a piece of them on each rank (then the parallel plan's object
stands in the place of `Whole`; no part knows which)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Entropy:
    """Sums over the targets that are not -1: the negative log-likelihood, and what is minimised."""

    nll: Tensor
    objective: Tensor


class Whole:
    """All rows are here."""

    def lookup(self, ids: Int[Tensor, "N"], table: Float[Tensor, "V D"]) -> Float[Tensor, "N D"]:
        return F.embedding(ids, table)

    def enter(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The features, on their way to be multiplied with the rows that are here."""
        return features

    def gather(self, logits: Float[Tensor, "N v"]) -> Float[Tensor, "N V"]:
        """The logits of all rows, from those of the rows that are here."""
        return logits

    def entropy(self, logits: Float[Tensor, "N v"], targets: Int[Tensor, "N"], smoothing: float, z: float) -> Entropy:
        """Cross-entropy in nats with label smoothing, and z * logsumexp^2 beside it."""
        nll = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        objective = nll
        if smoothing:
            objective = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        if z:
            log_z = torch.logsumexp(logits, -1)
            objective = objective + z * (log_z.square() * (targets >= 0)).sum()
        return Entropy(nll, objective)
