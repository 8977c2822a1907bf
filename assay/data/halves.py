"""A batch whose prefixes an encoder reads, as two: the source, and what the decoder says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from assay.data.loader import Batch
from assay.data.packing import IGNORED
from assay.spec.model import ModelSpec


@dataclass(frozen=True)
class Halves:
    """source: the prefixes, where an encoder reads them; own: each sequence from the last token of its prefix on, its
    places counted from there. Without an encoder `own` is the batch.

    Rows are as wide as the widest needs; the others end in padding, which is no sequence (-1) and no target. A sequence
    has the same number in both. places: where on the whole batch's axis each token of `own` stands.
    """

    source: Batch | None
    own: Batch
    places: Int64[Tensor, "N"]

    def to(self, device: torch.device | str) -> Halves:
        source = None if self.source is None else self.source.to(device)
        return Halves(source, self.own.to(device), self.places.to(device))


def halves(batch: Batch, spec: ModelSpec) -> Halves:
    """What a model's encoder and its decoder read of a batch. The decoder's first token is the last one of the prefix,
    so that this predicts what follows, as in a decoder that reads both. ValueError for an encoder without a prefix."""
    if spec.encoder is None:
        return Halves(None, batch, torch.arange(len(batch.inputs), device=batch.inputs.device))
    if batch.prefix is None:
        raise ValueError("an encoder reads the prefix of a sequence, and this batch has none")
    real, last = batch.seq >= 0, batch.prefix - 1
    source, _ = _taken(batch, real & (batch.index <= last))
    own, places = _taken(replace(batch, index=batch.index - last), real & (batch.index >= last))
    return Halves(replace(source, targets=torch.full_like(source.targets, IGNORED)), own, places)


def _taken(batch: Batch, chosen: Bool[Tensor, "N"]) -> tuple[Batch, Int64[Tensor, "M"]]:
    """The chosen tokens of every row at its beginning, and where they stood."""
    rows, length = batch.grid
    mask = chosen.view(rows, length)
    width = max(1, int(mask.sum(1).max()))
    columns = mask.byte().sort(dim=1, descending=True, stable=True).indices[:, :width]
    there = mask.gather(1, columns).flatten()
    places = (columns + length * torch.arange(rows, device=columns.device)[:, None]).flatten()
    index = batch.index[places].where(there, 0)
    begins = torch.nonzero(there & (index == 0))[:, 0]
    found = Batch(
        inputs=batch.inputs[places],
        targets=batch.targets[places].where(there, IGNORED),
        seq=batch.seq[places].where(there, -1),
        index=index,
        starts=torch.cat([begins, begins.new_tensor([rows * width])]),
        target_bytes=batch.target_bytes[places].where(there, 0),
        grid=(rows, width),
    )
    return found, places
