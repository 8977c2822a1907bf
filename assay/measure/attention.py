"""What attention looks at: the mass on the first token, the entropy, the largest logit, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from assay.data.loader import Batch
from assay.measure.subject import Subject, pieces
from assay.ops.attend import Scores, softmax, visible
from assay.ops.state import step_layout
from assay.ops.step import Step, View
from assay.parts.mixers.gqa import GqaMixer
from assay.train.evaluate import step_of


@torch.no_grad()
def measure(subject: Subject, *, tokens: int = 1024) -> list[dict[str, Any]]:
    """Rows: layer, tokens, sink_mass, entropy_nats, max_logit. Layers without softmax attention give no row.

    sink_mass: the share of attention on the first token of a sequence, the mean over heads and all queries but that
    token's own (attention sinks: Xiao et al. 2023, arXiv 2309.17453). entropy_nats: of the distribution over the keys,
    the mean over heads and queries. max_logit: the largest score before the softmax that a mask lets through.
    On about `tokens` tokens of validation text, in rows of the training length.
    """
    mixers = dict(attending(subject))
    totals = {name: Totals() for name in mixers}
    for piece in pieces(subject.joined(subject.length, tokens)) if mixers else ():
        batch = piece.to(subject.device)
        for name, (logits, sink) in scores(subject, mixers, batch).items():
            totals[name].add(logits, sink)
    return [totals[name].row(int(name.split(".")[1])) for name in mixers]


class Totals:
    """Sums over the batches of one layer."""

    def __init__(self) -> None:
        self.tokens = self.later = self.places = 0
        self.sink = self.entropy = 0.0
        self.top = float("-inf")

    def add(self, logits: Tensor, sink: Tensor | None) -> None:
        """Masked logits [R, H, T, T] of whole sequences, one a row."""
        p = softmax(logits, sink)
        rows, heads, length, _ = p.shape
        self.tokens += rows * length
        self.places += rows * heads * length
        self.later += rows * heads * (length - 1)
        self.sink += float(p[:, :, 1:, 0].sum())
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


def attending(subject: Subject) -> Iterator[tuple[str, GqaMixer]]:
    """The softmax attention of every layer, by its place."""
    for layer in range(subject.spec.layers):
        for site, _, _ in subject.spec.branches(layer):
            part = getattr(subject.model.blocks[layer], site.name.rpartition(".")[2])
            if isinstance(part, GqaMixer):
                yield f"{subject.model.prefix}{site.name}", part


def scores(subject: Subject, mixers: Mapping[str, GqaMixer], batch: Batch) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Masked logits [R, H, T, T] and sinks by place, from the queries and keys that the layers publish."""
    step = step_of(batch, frozenset(f"{name}.{what}" for name in mixers for what in "qk"))
    taps = subject.model.eval()(step).taps
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    given: dict[str, Tensor] = {}
    for name, mixer in mixers.items():
        k = taps[f"{name}.k"] if mixer.spec.takes is None else given[mixer.spec.takes]
        if mixer.spec.gives is not None:
            given[mixer.spec.gives] = k
        found[name] = logits(mixer, step, taps[f"{name}.q"], k), mixer.sink if mixer.spec.scores.sink else None
    return found


def logits(mixer: GqaMixer, step: Step, q: Tensor, k: Tensor) -> Tensor:
    """The layer's own rule on queries [N, H, K] and stored keys [N, G, K], one sequence a row of the grid."""
    layout, scheme = step_layout(step), mixer.scheme[0] if mixer.scheme else None
    view = View({"k": k.view(*layout.seq.shape, *k.shape[1:])}, layout)
    view = scheme.on_read(q, view, step)[1] if scheme is not None else view
    rule = mixer.spec.scores
    scale = q.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    how = Scores(scale, rule.softcap, None, scheme.bias() if scheme is not None else None)
    queries = q.view(*layout.seq.shape, *q.shape[1:]).transpose(1, 2)
    keys = view.dense("k").transpose(1, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    places = layout.positions[:, None]
    z = how.logits(queries @ keys.transpose(-1, -2), queries, places, places)
    return z.masked_fill(~visible(step, layout, mixer.spec.sees)[:, None], float("-inf"))
