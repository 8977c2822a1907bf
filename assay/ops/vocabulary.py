"""How a vocabulary's rows lie: whole on one process, or a piece of them on each rank (then the parallel plan's object
stands in the place of `Whole`; no part knows which)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from assay.ops.native import Kernels, training
from assay.ops.precision import high


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
        """Cross-entropy in nats with label smoothing, and z * logsumexp^2 beside it; sums are in float32."""
        native = training(logits, half=True)
        if native is not None and not (smoothing or z):
            nll = _Entropy.apply(logits, targets, native)
            return Entropy(nll, nll)
        logits = high(logits)
        nll = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        objective = nll
        if smoothing:
            objective = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        if z:
            log_z = torch.logsumexp(logits, -1)
            objective = objective + z * (log_z.square() * (targets >= 0)).sum()
        return Entropy(nll, objective)


class _Entropy(torch.autograd.Function):
    """By the compiled kernels: kept are the logits as they came and a number a row, where torch keeps all logarithms of
    probabilities and fills a second such table with the gradient's zeros."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, native: Kernels) -> Tensor:
        logits = logits if logits.shape[-1] == 1 or logits.stride(-1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        if targets.numel() and not -1 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise IndexError(f"targets: from {int(targets.min())} to {int(targets.max())} of {logits.shape[1]} logits")
        all_, nll = native.entropy(logits, targets)
        ctx.native = native
        ctx.save_for_backward(logits, targets, all_)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, all_ = ctx.saved_tensors
        return ctx.native.entropy_back(logits, targets, all_, float(grads[0])), None, None
