"""Biases on attention scores that depend on the distance between query and key alone."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from assay.ops.attend import Bias
from assay.parts.base import Position


class DistancePosition(Position):
    """A scheme that adds a number for each head and distance; it is its own `Bias`."""

    def by_distance(self, distance: Int[Tensor, "*d"]) -> Float[Tensor, "H *d"]:
        """The bias of every head at query position minus key position."""
        raise NotImplementedError

    def tile(self, scores: Tensor, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """scores [..., H, T, S] plus the bias; q_pos [..., T] and k_pos [..., S] may have an axis of one for H."""
        return scores + self.by_distance(between(scores, q_pos, k_pos)).movedim(0, -3).to(scores.dtype)

    def bias(self) -> Bias:
        return self


def between(scores: Tensor, q_pos: Tensor, k_pos: Tensor) -> Int[Tensor, "*d T S"]:
    """Query position minus key position for scores [..., H, T, S], without the axis of heads."""
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    return distance.squeeze(-3) if distance.dim() == scores.dim() else distance


def refuse_heads(kind: str, heads: int, asked: int) -> None:
    if heads != asked:
        raise ValueError(f"the {kind} scheme has `heads: {heads}`, but the layer has {asked} query heads")
