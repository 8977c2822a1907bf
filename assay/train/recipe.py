"""The recipe: everything about a training run but the architecture. It sees sizes, never a mechanism. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from assay.data.corpora import CorpusSpec
from assay.data.packing import Packing
from assay.data.tasks.base import Task, tasks
from assay.data.tasks.passkey import Passkey
from assay.data.tokenizers import TokenizerSpec
from assay.spec.base import NestedError, Spec, first_error
from assay.spec.load import apply_changes, digest, dump, find, read_mapping, validate
from assay.train.optim.specs import OPTIMIZERS, AdamWSpec, OptimizerSpec
from assay.train.parallel.spec import ParallelSpec, Recompute
from assay.train.tracking.base import Kind

Precision = Literal["auto", "float32", "bfloat16"]
CORPORA = get_args(CorpusSpec.model_fields["kind"].annotation)
Share = float
"""A length of the schedule: below 1, a share of the run; from 1 on, a number of steps."""


class ScheduleSpec(Spec):
    """The learning rate over the run, as a multiple of its peak; `assay.train.schedule.factor` has the formulas.

    warmup, decay: below 1 a share of the run, from 1 on a number of steps. final: the multiple at the last step.
    wsd is warmup, stable, decay (Hu et al. 2024, arXiv 2404.06395); `decay` is read by it alone.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: Share = Field(0.1, ge=0.0)
    final: float = Field(0.1, ge=0.0, le=1.0)
    decay: Share = Field(0.2, ge=0.0)

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ValueError(f"{name}: {value}; accepted: a share below 1, or a whole number of steps")
        return self

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        unread = {"wsd": (), "constant": ("final", "decay")}.get(self.kind, ("decay",))
        for name in unread:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: {getattr(self, name)}; a {self.kind} schedule does not read it: leave it out"
                )
        return self


class BatchSpec(Spec):
    """One optimiser step: `rows` rows of `length` tokens, computed in `accumulate` pieces of equally many rows.

    The pieces change how much memory a step takes, and nothing else. packing: how documents become rows: one after
    another and cut (concatenate), or whole as far as they fit, with padding (best_fit; `assay.data.packing.BestFit`).
    epochs: how often a run reads its text, which is cut down for it: to the run's tokens over this number; null: all of
    the text is there to be read.
    """

    rows: int = Field(4, ge=1)
    length: int = Field(128, ge=1)
    accumulate: int = Field(1, ge=1)
    packing: Packing = "concatenate"
    epochs: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _even_pieces(self) -> Self:
        if self.rows % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate}; rows is {self.rows}, which is not a multiple of it")
        return self

    @property
    def tokens(self) -> int:
        return self.rows * self.length


class PerParam(Spec):
    """A number of training tokens for each parameter of the model: about 20 is where a fixed amount of compute buys
    the lowest loss (Hoffmann et al. 2022, arXiv 2203.15556, table 3)."""

    per_param: float = Field(gt=0.0)


class LossSpec(Spec):
    """What is to be predicted, in training and in validation, and how it is counted.

    smoothing: label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7). z: weight of the z-loss
    z * logsumexp^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    prefix: every sequence opens with a prefix of a length drawn evenly from 1 to its own, and only what follows it is
    predicted (prefix LM: Raffel et al. 2019, arXiv 1910.10683, section 3.2.2). Layers with `sees: {prefix: true}` read
    it both ways. hidden: in place of the next token, this share of the tokens themselves, drawn one by one and hidden
    behind the byte 0xFF, which no UTF-8 text has (masked LM: Devlin et al. 2018, arXiv 1810.04805, section 3.1; there
    a fifth of the chosen tokens keeps another symbol).
    """

    smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    z: float = Field(0.0, ge=0.0)
    prefix: bool = False
    hidden: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if self.prefix and self.hidden:
            raise ValueError(f"prefix: true, hidden: {self.hidden}; accepted: one of the two")
        return self


class MixSpec(Spec):
    """The share of rows that are passkey documents, and what these are made of; the others are the corpus."""

    share: float = Field(0.0, ge=0.0, le=1.0)
    passkey: Passkey = Passkey()

    @model_validator(mode="after")
    def _some_share(self) -> Self:
        if not self.share and self.passkey != Passkey():
            raise ValueError("passkey: is set, but share is 0, so no row holds one; accepted: a share above 0")
        return self


class EvaluationSpec(Spec):
    """Validation on the same `tokens` tokens (at most) every time, `points` times, evenly spread, last at the end.

    tokens: 0 leaves validation out. ema: an average of the weights is kept beside them, which forgets at this rate a
    step (`assay.train.ema`); it is evaluated too, and saved as a checkpoint in the run's folder, `ema`. packing: of
    documents into rows, as in batch. Windows cut one after another begin inside documents, which a run that read whole
    documents has never seen.
    """

    tokens: int = Field(65_536, ge=0)
    points: int = Field(4, ge=1)
    ema: float | None = Field(None, gt=0.0, lt=1.0)
    packing: Packing = "concatenate"


def data_class(kind: Any) -> type[CorpusSpec | Task]:
    """What a recipe's `data` of this kind is. A corpus imports no task. ValueError with the accepted kinds."""
    if kind is None or kind in CORPORA:
        return CorpusSpec
    if isinstance(kind, str) and kind in tasks():
        return tasks()[kind]
    accepted = f"{', '.join(CORPORA)}, or a task: {', '.join(sorted(tasks()))}"
    raise NestedError(("kind",), f"{kind!r}; accepted: {accepted}")


class ConductSpec(Spec):
    """How a run is carried out: nothing here changes what is computed (`Recipe.computed`).

    parallel: over how many processes, and how. recompute: what is computed again in the backward pass, so that less is
    kept for it: nothing; all but the products of a block (selective); or all of a block but its input (full: Chen et
    al. 2016, arXiv 1604.06174). track: what the metrics are told to besides the run's own file.
    """

    parallel: ParallelSpec = ParallelSpec()
    recompute: Recompute = "none"
    track: tuple[Kind, ...] = ()


class Recipe(ConductSpec):
    """What is held fixed while architectures are compared.

    data: a corpus, or a task of `assay.data.tasks` by its kind: then a batch's rows are the task's rows.
    tokens: how many to train on, rounded up to whole steps, or `{per_param: 20}`.
    precision: of the matrix products; weights and optimiser state are float32. `auto` is bfloat16 where the machine
    multiplies it natively and float32 elsewhere (`assay.train.precision.resolve`, before the digest is taken).
    clip: the largest global norm of the gradient; null: not clipped. seed: initial weights, data order and dropout.
    """

    data: CorpusSpec | SerializeAsAny[Task] = CorpusSpec()
    tokenizer: TokenizerSpec = TokenizerSpec()
    optimizer: SerializeAsAny[OptimizerSpec] = AdamWSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec = BatchSpec()
    tokens: int | PerParam = 262_144
    precision: Precision = "auto"
    clip: float | None = Field(1.0, gt=0.0)
    loss: LossSpec = LossSpec()
    mix: MixSpec = MixSpec()
    seed: int = Field(0, ge=0)
    evaluation: EvaluationSpec = EvaluationSpec()

    @field_validator("data", mode="before")
    @classmethod
    def _corpus_or_task(cls, value: Any) -> Any:
        """Chosen here by its kind: what pydantic says about a union names both of its sides."""
        if not isinstance(value, Mapping):
            return value
        try:
            return data_class(value.get("kind")).model_validate(value)
        except ValidationError as error:
            raise NestedError(*first_error(error)) from None

    @field_validator("optimizer", mode="before")
    @classmethod
    def _by_its_kind(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kind = value.get("kind", "adamw")
        if kind not in OPTIMIZERS:
            raise NestedError(("kind",), f"{kind!r}; accepted: {', '.join(OPTIMIZERS)}")
        try:
            return OPTIMIZERS[kind].model_validate(value)
        except ValidationError as error:
            raise NestedError(*first_error(error)) from None

    @model_validator(mode="after")
    def _no_end_in_sight(self) -> Self:
        if self.optimizer.kind == "schedule_free" and self.schedule.kind != "constant":
            raise ValueError(
                f"schedule.kind: {self.schedule.kind}; the optimiser averages in its place: accepted: constant"
            )
        return self

    @model_validator(mode="after")
    def _rows_of_a_task(self) -> Self:
        """A task says its rows itself; what would change them is refused."""
        if not isinstance(self.data, Task):
            return self
        if self.batch.length != self.data.length:
            raise ValueError(f"batch.length: {self.batch.length}; the rows of data have {self.data.length} symbols")
        if {self.batch.packing, self.evaluation.packing} != {"concatenate"} or self.batch.epochs is not None:
            raise ValueError("batch.packing, batch.epochs, evaluation.packing: a task has its own rows: leave them out")
        for name in ("tokenizer", "mix"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: a task ({self.data.kind_name()}) brings its own symbols: leave it out")
        if self.loss.prefix or self.loss.hidden:
            raise ValueError("loss: prefix and hidden ask for text; a task says what is to be predicted")
        return self

    @field_validator("tokens", mode="before")
    @classmethod
    def _a_count(cls, value: Any) -> Any:
        """Said here: what pydantic says about a union names both of its sides."""
        if isinstance(value, PerParam) or (isinstance(value, Mapping) and value.keys() == {"per_param"}):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
            raise ValueError(f"{value!r}; accepted: a whole number from 1 on, or {{per_param: number}}")
        return int(value)

    @property
    def unique(self) -> int | None:
        """How many tokens of text the run's rows are cut from; null: all there are."""
        if self.batch.epochs is None:
            return None
        if isinstance(self.tokens, PerParam):
            raise ValueError("batch.epochs: how much text a run reads has to be said: accepted: tokens as a number")
        return -(-self.tokens // self.batch.epochs)

    def steps(self, parameters: int) -> int:
        """Optimiser steps for a model of this many parameters: the tokens, rounded up to whole batches."""
        wanted = self.tokens.per_param * parameters if isinstance(self.tokens, PerParam) else self.tokens
        return max(1, math.ceil(wanted / self.batch.tokens))

    @property
    def computed(self) -> Recipe:
        """The recipe without what does not change the result: how the run is carried out."""
        return self.model_copy(update={name: f.default for name, f in ConductSpec.model_fields.items()})

    @property
    def digest(self) -> str:
        """16 hex digits over everything that is computed but the seed, which stands beside it in a Result. ValueError
        for `auto`, which means different things on different machines."""
        if self.precision == "auto":
            raise ValueError("recipe.precision: auto has no digest; resolve it for a device first")
        return digest(self.computed.model_copy(update={"seed": type(self).model_fields["seed"].default}))


def load_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a shipped name, a YAML file or a run's folder, with dotted changes (`recipe.` is optional)."""
    folder = Path(source)
    path = folder / "recipe.yaml" if (folder / "recipe.yaml").is_file() else find(source, "recipes")
    recipe = validate(Recipe, read_mapping(path), str(source))
    return change_recipe(recipe, changes, str(source)) if changes else recipe


def change_recipe(recipe: Recipe, changes: Mapping[str, Any], where: str = "changes") -> Recipe:
    """The recipe with dotted paths set, validated again."""
    tree = apply_changes(dump(recipe), {path.removeprefix("recipe."): value for path, value in changes.items()})
    return validate(Recipe, tree, where)
