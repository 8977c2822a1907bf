"""What attention looks at: the mass on the first token, the entropy, the largest logit, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from assay.measure.subject import Subject, pieces
from assay.train.evaluate import step_of

SECONDS = 0.1


@torch.no_grad()
def measure(subject: Subject, *, tokens: int = 1024) -> list[dict[str, Any]]:
    """Rows: layer, tokens, sink_mass, entropy_nats, max_logit. Layers without softmax attention give no row.

    sink_mass: the share of attention on the first token of a sequence, the mean over heads and all queries but that
    token's own (attention sinks: Xiao et al. 2023, arXiv 2309.17453). entropy_nats: of the distribution over the keys,
    the mean over heads and queries. max_logit: the largest score before the softmax that a mask lets through.
    On about `tokens` tokens of validation text, in rows of the training length. Whatever mixer publishes the taps
    `scores` and `probs` is measured.
    """
    places = f"{subject.model.prefix}blocks."
    listen = frozenset(f"{places}*.{tap}" for tap in ("scores", "probs"))
    totals: dict[str, Totals] = {}
    for piece in pieces(subject.joined(subject.length, tokens)):
        taps = subject.model.eval()(step_of(piece.to(subject.device), listen)).taps
        for name in [name for name in taps if name.endswith(".scores")]:
            mixer = name.removesuffix(".scores")
            totals.setdefault(mixer, Totals()).add(taps[name], taps[f"{mixer}.probs"], piece.grid[0])
    return [found.row(int(mixer.removeprefix(places).split(".")[0])) for mixer, found in totals.items()]


class Totals:
    """Sums over the batches of one layer."""

    def __init__(self) -> None:
        self.tokens = self.later = self.places = 0
        self.sink = self.entropy = 0.0
        self.top = float("-inf")

    def add(self, logits: Float[Tensor, "N H S"], p: Float[Tensor, "N H S"], rows: int) -> None:
        """Masked logits and probabilities of whole sequences, `rows` of them one after the other."""
        tokens, heads, _ = p.shape
        self.tokens += tokens
        self.places += tokens * heads
        self.later += (tokens - rows) * heads
        self.sink += float(p.unflatten(0, (rows, -1))[:, 1:, :, 0].sum())
        self.entropy -= float(torch.xlogy(p, p).sum())
        self.top = max(self.top, float(logits.max()))

    def row(self, layer: int) -> dict[str, Any]:
        return {
            "layer": layer,
            "tokens": self.tokens,
            "sink_mass": self.sink / max(1, self.later),
            "entropy_nats": self.entropy / self.places,
            "max_logit": self.top,
        }
