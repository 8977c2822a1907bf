"""The vocabulary's rows dealt out to ranks: lookups, logits and cross-entropy of pieces.

After Shoeybi et al. 2019, arXiv 1909.08053, section 3: the logits of a token are never gathered for its loss; what is
exchanged are three numbers a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.precision import high
from assay.ops.vocabulary import Entropy, Whole
from assay.train.parallel.exchange import Line, copied, summed


class Pieces(Whole):
    """Rank r of n has rows r V / n to (r + 1) V / n."""

    def __init__(self, line: Line, vocab: int) -> None:
        self.line, self.vocab = line, vocab
        self.rows = vocab // line.ranks
        self.first = line.rank * self.rows

    def inside(self, ids: Int[Tensor, "N"]) -> tuple[Tensor, Tensor]:
        """The rows of these ids here, and which ids have theirs elsewhere."""
        place = ids - self.first
        outside = (place < 0) | (place >= self.rows)
        return place.masked_fill(outside, 0), outside

    def lookup(self, ids: Int[Tensor, "N"], table: Float[Tensor, "v D"]) -> Float[Tensor, "N D"]:
        place, outside = self.inside(ids)
        return summed(F.embedding(place, table).masked_fill(outside[:, None], 0.0), self.line)

    def enter(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return copied(features, self.line)

    def gather(self, logits: Float[Tensor, "N v"]) -> Float[Tensor, "N V"]:
        """Without a gradient: for reading, while losses are made by `entropy`."""
        pieces = self.line.comm.all_gather(logits.detach().contiguous(), self.line.group)
        return pieces.movedim(0, -2).flatten(-2)

    def entropy(self, logits: Float[Tensor, "N v"], targets: Int[Tensor, "N"], smoothing: float, z: float) -> Entropy:
        """log sum exp over all ranks, less the target's logit from the rank that has it."""
        logits, real = high(logits), targets >= 0
        top = self.line.largest(logits.max(-1).values)
        log_z = top + summed((logits - top[:, None]).exp().sum(-1), self.line).log()
        place, outside = self.inside(targets.clamp(min=0))
        own = logits.gather(-1, place[:, None])[:, 0].masked_fill(outside, 0.0)
        losses = log_z - summed(own, self.line)
        nll = losses.where(real, 0.0).sum()
        objective = nll
        if smoothing:
            even = log_z - summed(logits.sum(-1), self.line) / self.vocab
            objective = (1 - smoothing) * nll + smoothing * even.where(real, 0.0).sum()
        if z:
            objective = objective + z * (log_z.square() * real).sum()
        return Entropy(nll, objective)


def apply(model: torch.nn.Module, line: Line, vocab: int) -> None:
    """Every part of the model that reads or writes the vocabulary reads and writes this rank's piece of it."""
    for module in model.modules():
        if isinstance(getattr(module, "rows", None), Whole):
            module.rows = Pieces(line, vocab)  # type: ignore[assignment]
