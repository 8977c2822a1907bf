"""What a batch asks for: the next token, what follows a prefix, or tokens that were hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from assay.data.draws import scatter
from assay.data.loader import Batch
from assay.data.packing import IGNORED
from assay.train.recipe import LossSpec

HIDDEN = 0xFF
"""The byte behind which tokens are hidden: UTF-8 never uses it."""


def posed(batch: Batch, loss: LossSpec, *key: int | str) -> Batch:
    """The batch as the recipe's loss asks it; what is drawn depends on the key and the batch's shape alone."""
    if loss.prefix:
        return with_prefixes(batch, *key)
    return with_hidden(batch, loss.hidden, *key) if loss.hidden else batch


def with_prefixes(batch: Batch, *key: int | str) -> Batch:
    """A prefix of 1 to n tokens for every sequence of n, and the targets behind it. The last token of a prefix predicts
    the first one after it, which it does not see."""
    drawn = scatter(np.arange(len(batch.starts) - 1, dtype=np.uint64), "prefix", *key)
    size = batch.starts.diff()
    lengths = 1 + torch.from_numpy((drawn % size.numpy().astype(np.uint64)).astype(np.int64))
    prefix = lengths.repeat_interleave(size)
    counts = batch.index >= prefix - 1
    return replace(
        batch,
        targets=batch.targets.where(counts, IGNORED),
        target_bytes=batch.target_bytes.where(counts, 0),
        prefix=prefix,
    )


def with_hidden(batch: Batch, share: float, *key: int | str) -> Batch:
    """Each token hidden with probability `share`; a hidden token's target is itself. For batches of bytes."""
    drawn = scatter(np.arange(len(batch.inputs), dtype=np.uint64), "hidden", *key)
    hidden = torch.from_numpy(drawn < np.uint64(int(share * 2**64)))
    return replace(
        batch,
        inputs=batch.inputs.masked_fill(hidden, HIDDEN),
        targets=batch.inputs.where(hidden, IGNORED),
        target_bytes=hidden.long(),
    )
