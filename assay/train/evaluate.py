"""Losses of a trained model on text: in nats a token, in bits a byte, and by place in the context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.data.halves import Halves, halves
from assay.data.loader import Batch
from assay.data.tokenizers import bits_per_byte
from assay.model.lm import LM
from assay.ops.precision import high
from assay.ops.step import RowsOf, Step, training_step
from assay.train.precision import Runner

LOGITS = 1 << 24
"""How many logits are held at once."""


@dataclass(frozen=True)
class Evaluation:
    """Sums over the targets of some batches.

    index_nats[i], index_tokens[i]: the loss, and the number of targets, whose input token stands at place i of its
    sequence, so that i + 1 tokens were read.
    """

    tokens: int
    bytes: int
    index_nats: tuple[float, ...]
    index_tokens: tuple[int, ...]

    def checked(self) -> Evaluation:
        """ValueError when there was no target."""
        if not self.tokens:
            raise ValueError("there is nothing to evaluate on: no token of the data is a target")
        return self

    @property
    def loss_nats(self) -> float:
        """The mean over all targets."""
        return sum(self.index_nats) / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """The loss of all targets over the bytes they stand for: nats x tokens / (bytes x ln 2)."""
        return bits_per_byte(self.loss_nats, self.tokens, self.bytes)

    @property
    def in_context_nats(self) -> float:
        """The mean loss in the first quarter of places less that in the last quarter: above 0 when context helps.

        After the in-context learning score of Olsson et al. 2022, arXiv 2209.11895 (there token 50 against 500).
        """
        quarter = max(1, len(self.index_nats) // 4)
        return self._mean(slice(0, quarter)) - self._mean(slice(len(self.index_nats) - quarter, None))

    def _mean(self, places: slice) -> float:
        count = sum(self.index_tokens[places])
        return sum(self.index_nats[places]) / count if count else float("nan")

    def by_position(self, bins: int = 64) -> tuple[list[float], list[float]]:
        """Places (the middle of each bin) and the mean loss there; bins of equal width, at most `bins` of them."""
        width = -(-len(self.index_nats) // bins)
        found = [slice(i, min(i + width, len(self.index_nats))) for i in range(0, len(self.index_nats), width)]
        found = [places for places in found if sum(self.index_tokens[places])]
        return [(p.start + p.stop - 1) / 2 for p in found], [self._mean(p) for p in found]

    @property
    def last_nats(self) -> float:
        """The mean loss over the last eighth of places: what a context of full length is worth."""
        return self._mean(slice(len(self.index_nats) * 7 // 8, None))


def step_of(batch: Batch, listen: frozenset[str] = frozenset()) -> Step:
    """The step that reads a batch; length-dependent position schemes plan for the rows' length."""
    step = training_step(batch.inputs, batch.seq, batch.index, batch.grid, batch.grid[1], listen, batch.whole)
    return step if batch.prefix is None else step.with_(prefix=batch.prefix)


def step_of_halves(read: Halves, part: RowsOf | None = None) -> Step:
    """The step in which a model reads what `assay.data.halves` has for it. part: of these rows, among others'."""
    step = step_of(read.own).with_(part=part)
    return step if read.source is None else step.with_(encode=step_of(read.source).with_(part=part))


@torch.no_grad()
def token_losses(model: LM, batch: Batch, precision: str = "float32") -> Tensor:
    """[N] float32: the loss of each target in nats, 0 where the target is -1."""
    runner = Runner(model, precision)
    rows = max(1, LOGITS // (batch.grid[1] * model.spec.vocab))
    pieces = batch.split(rows) if rows < batch.grid[0] else (batch,)
    return torch.cat([_piece(runner, piece) for piece in pieces])


def _piece(runner: Runner, batch: Batch) -> Tensor:
    read, found = halves(batch, runner.model.spec), torch.zeros(batch.targets.shape, device=batch.targets.device)
    logits = runner(step_of_halves(read)).logits
    if logits is None:  # a stage of a pipeline before the last
        return found
    losses = F.cross_entropy(high(logits), read.own.targets, ignore_index=-1, reduction="none").float()
    return found.index_add(0, read.places, losses)


def evaluate(model: LM, batches: Iterable[Batch], precision: str = "float32") -> Evaluation:
    """The model's losses over batches, without dropout. ValueError when they hold no target.

    Rows are read as they stand: documents of one row do not see each other unless the batch says so (`join`).
    """
    return tally(model, batches, precision).checked()


def tally(model: LM, batches: Iterable[Batch], precision: str = "float32") -> Evaluation:
    """As `evaluate`, of batches that may hold no target."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        nats, counts = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
        tokens = size = 0
        for batch in batches:
            loss = token_losses(model, batch.to(device), precision).double().cpu()
            nats = _added(nats, torch.zeros(batch.grid[1], dtype=nats.dtype).index_add(0, batch.index, loss))
            heard = (batch.targets >= 0).long()
            counts = _added(counts, torch.zeros(batch.grid[1], dtype=torch.long).index_add(0, batch.index, heard))
            tokens, size = tokens + batch.counted, size + batch.bytes
    finally:
        model.train(was_training)
    return Evaluation(tokens, size, tuple(nats.tolist()), tuple(counts.tolist()))


def _added(total: Tensor, part: Tensor) -> Tensor:
    """The sum of two vectors, the shorter one continued by zeros."""
    length = max(len(total), len(part))
    return F.pad(total, (0, length - len(total))) + F.pad(part, (0, length - len(part)))
