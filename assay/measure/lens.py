"""The logit lens: what the head reads off the residual stream after each layer."""

from __future__ import annotations

from typing import Any

import torch

from assay.measure.subject import Subject, pieces
from assay.train.evaluate import step_of

SECONDS = 0.1


@torch.no_grad()
def measure(subject: Subject, *, tokens: int = 4096) -> list[dict[str, Any]]:
    """Rows: layer, loss_nats: the loss of the stream after `layer` blocks (0: the embedding) through the final norm and
    the head, on `tokens` tokens of validation text. The last one is the model's own loss. nostalgebraist 2020,
    "interpreting GPT: the logit lens".
    """
    model, layers = subject.model.eval(), subject.spec.layers
    if model.head is None:
        raise ValueError("lens: model.head is null; a head is what reads the stream")
    place = model.prefix
    names = [f"{place}blocks.0.in", *(f"{place}blocks.{i}.out" for i in range(layers))]
    nats, count = [0.0] * len(names), 0
    for piece in pieces(subject.joined(subject.length, tokens)):
        batch = piece.to(subject.device)
        step = step_of(batch, frozenset(names))
        taps = model(step).taps
        count += batch.counted
        for i, name in enumerate(names):
            h = model.blocks[0].close(taps[name])
            h = h if model.final_norm is None else model.final_norm(h, step)
            nats[i] += float(model.head.loss(h, batch.targets, step, model.embed.table(), None)["nll"])
    return [{"layer": i, "loss_nats": total / count} for i, total in enumerate(nats)]
