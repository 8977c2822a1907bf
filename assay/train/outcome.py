"""What comes out of training: while it runs, when it fails, and at the end."""

from __future__ import annotations

from dataclasses import dataclass

from assay.data.dataset import Data
from assay.data.tokenizers import Tokenizer
from assay.model.lm import LM
from assay.train.evaluate import Evaluation
from assay.train.recipe import Recipe


class Diverged(ValueError):
    """The loss or the gradient is no longer a number. `step` is the first step where it was not."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Status:
    """What a watcher is told: `mfu` when the machine's rate was given, `valid_nats` once there was a validation."""

    step: int
    steps: int
    tokens: int
    loss_nats: float
    tok_s: float
    left_s: float
    mfu: float | None = None
    valid_nats: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """A trained model, in evaluation mode, and how it came about. `losses`, `valid_losses`: (tokens, nats) pairs.

    recipe: with its precision resolved. evaluation: the last validation; None when the recipe has none. averaged: that
    of the weights' average; None where none is kept.
    """

    model: LM
    tokenizer: Tokenizer
    recipe: Recipe
    dataset: Data
    steps: int
    evaluation: Evaluation | None
    losses: tuple[tuple[int, float], ...]
    valid_losses: tuple[tuple[int, float], ...]
    train_s: float
    train_flops: float
    averaged: Evaluation | None = None

    @property
    def tokens(self) -> int:
        return self.steps * self.recipe.batch.tokens

    @property
    def train_tok_s(self) -> float:
        """Tokens a second of training, without validation and saving."""
        return self.tokens / self.train_s if self.train_s else 0.0
