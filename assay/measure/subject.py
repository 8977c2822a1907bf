"""What is measured: a model with the recipe and the text that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from assay.data.dataset import Dataset
from assay.data.loader import Batch, windows
from assay.data.shards import Shard
from assay.data.tokenizers import Tokenizer
from assay.model.lm import LM
from assay.spec.model import ModelSpec
from assay.train.evaluate import token_losses
from assay.train.outcome import TrainResult
from assay.train.recipe import Recipe

SQUARE = 1 << 24
"""Entries of the attention mask (rows x length x length) that one pass may take."""


@dataclass(frozen=True)
class Subject:
    """A model, and how it came about. dataset: None where it was no text. outcome: its training."""

    model: LM
    spec: ModelSpec
    recipe: Recipe
    tokenizer: Tokenizer
    dataset: Dataset | None = None
    outcome: TrainResult | None = None

    @classmethod
    def of(cls, trained: TrainResult) -> Self:
        dataset = trained.dataset if isinstance(trained.dataset, Dataset) else None
        return cls(trained.model, trained.model.spec, trained.recipe, trained.tokenizer, dataset, trained)

    def variant(self, spec: ModelSpec) -> Self:
        """The same weights under another spec. ValueError where that spec has other weights."""
        model = LM(spec)
        try:
            model.load_state_dict(self.model.state_dict(), assign=True)
        except RuntimeError:
            raise ValueError("a variant must keep every weight: this change adds, removes or resizes some") from None
        return replace(self, model=model.eval(), spec=spec)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def length(self) -> int:
        """The length of the rows it was trained on."""
        return self.recipe.batch.length

    @property
    def limit(self) -> int | None:
        """How many positions the model's schemes have; None: no end."""
        ends = [scheme.limit(self.spec.root(f"positions.{name}")) for name, scheme in self.spec.positions.items()]
        return min((end for end in ends if end is not None), default=None)

    def refusal(self, length: int) -> str | None:
        """Why the model cannot read `length` tokens, or None."""
        if self.limit is None or length <= self.limit:
            return None
        return f"refused: {length} tokens, and the positions of this model end at {self.limit}"

    @property
    def text(self) -> Shard:
        """The validation documents. ValueError where there are none."""
        if self.dataset is None or self.dataset.valid is None:
            raise ValueError("there is no validation text to measure on (recipe.data.valid_one_in is 0, or no data)")
        return self.dataset.valid

    def joined(self, length: int, tokens: int, most: int | None = None) -> Batch:
        """Windows from all over the validation text, about `tokens` tokens and at most `most` windows in all; documents
        run on into one another, so that every context is as long as it looks."""
        count = max(1, tokens // length)
        return windows(self.text, length, count if most is None else min(count, most), join=True)

    def losses(self, batch: Batch) -> Tensor:
        """[R, T] float32: the loss of each target in nats."""
        self.model.eval()
        found = [token_losses(self.model, piece.to(self.device)) for piece in pieces(batch)]
        return torch.cat(found).view(batch.grid).cpu()


def pieces(batch: Batch) -> Iterator[Batch]:
    """As many rows at once as a mask of `SQUARE` entries covers."""
    return batch.split(max(1, SQUARE // batch.grid[1] ** 2))


def prefix(batch: Batch, length: int) -> Batch:
    """The first `length` columns of a batch of whole rows (one sequence a row)."""
    rows, full = batch.grid
    cut = {n: getattr(batch, n).view(rows, full)[:, :length].reshape(-1) for n in ("inputs", "targets", "target_bytes")}
    seq = torch.arange(rows).repeat_interleave(length)
    starts = torch.arange(rows + 1) * length
    return Batch(**cut, seq=seq, index=torch.arange(length).repeat(rows), starts=starts, grid=(rows, length))
