"""What a little fine-tuning at a longer length recovers, under each position scheme of one trained model.

Position interpolation is meant to be fine-tuned: Chen et al. 2023, arXiv 2306.15595, section 3.1 (1000 steps on
longer rows). Peng et al. 2023, arXiv 2309.00071, section 4.1, does the same for YaRN (400 steps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from assay.measure import extrapolation
from assay.measure.extrapolation import BASE, Row
from assay.measure.subject import Subject
from assay.model.lm import LM
from assay.spec.load import change
from assay.train.loop import train_further
from assay.train.recipe import Recipe, change_recipe

SECONDS = 12.0  # three variants of a two-layer model, 400 000 tokens of training
NONE = "none"
WARMUP = 0.1
"""The share of the tuning that warms up, for the optimiser begins with no moments: 20 steps of 400 to 1000 in the
papers."""


@dataclass(frozen=True)
class Tuning:
    """Rows of `length` tokens, `share` of the training's tokens, at `rate` times its peak learning rate."""

    length: int
    share: float
    rate: float

    def recipe(self, subject: Subject) -> Recipe:
        """The subject's recipe, with the same data, mix and seed, and as many tokens a step as whole rows allow."""
        held = subject.recipe
        rows = max(1, held.batch.tokens // self.length)
        trained = held.steps(sum(p.numel() for p in subject.model.parameters())) * held.batch.tokens
        batch = {"rows": rows, "length": self.length, "accumulate": math.gcd(rows, held.batch.accumulate)}
        changes = {
            "batch": batch,
            "tokens": math.ceil(self.share * trained),
            "schedule": {"kind": "constant", "warmup": WARMUP},
            "optimizer.lr": held.optimizer.lr * self.rate,
            "evaluation.tokens": 0,
        }
        return change_recipe(held, changes, "recovery")


def measure(
    subject: Subject,
    *,
    ratios: Sequence[float] = (1, 2, 4),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    factor: float = 4.0,
    share: float = 0.05,
    rate: float = 0.25,
    windows: int = 32,
) -> list[Row]:
    """Rows: variant, tuned, ratio, length, loss_nats, last_nats, tokens_tuned; as `extrapolation` reads its windows.

    Each variant as it is (tuned: false), and after training on from the same weights (tuned: true): `share` of the
    training's tokens, in rows of `factor` times its length, the learning rate constant at `rate` times the peak.
    variants: as in `extrapolation`; `none`, the model as it was trained, is always there: what it gains is owed to the
    longer rows alone. A variant that cannot be read or trained at that length has rows with a `reason`. The subject's
    model stays as it is.

    rate: the papers tune for hundreds of steps at a fifteenth of the peak of the models they tune (2e-5 of 3e-4). A
    twentieth of a small run is a few dozen steps, so the default is above that; at the peak itself a model loses what
    its schedule's decay had gained.
    """
    given = dict(variants or {})
    check(given, factor, share, rate)
    tuning = Tuning(round(factor * subject.length), share, rate)
    before = extrapolation.measure(subject, ratios=ratios, variants=given, windows=windows)
    rows: list[Row] = []
    for name, changes in {NONE: {}, **given}.items():
        as_is = [row for row in before if row["variant"] == (BASE if name == NONE else name)]
        found, tokens = tune(subject, changes, tuning)
        if isinstance(found, str):
            after = [row | {"loss_nats": None, "last_nats": None, "reason": found} for row in as_is]
        else:
            after = extrapolation.measure(found, ratios=ratios, windows=windows)
        rows += [line(row, name, False, 0) for row in as_is] + [line(row, name, True, tokens) for row in after]
    return rows


def check(variants: Mapping[str, Any], factor: float, share: float, rate: float) -> None:
    for name in (NONE, BASE):
        if name in variants:
            raise ValueError(f"recovery: variants: {name!r} is the model as it was trained; accepted: another name")
    if not factor >= 1:
        raise ValueError(f"recovery: factor: {factor}; accepted: 1 or more times the training length")
    if not 0 <= share <= 1:
        raise ValueError(f"recovery: share: {share}; accepted: 0 to 1 of the training's tokens")
    if not rate > 0:
        raise ValueError(f"recovery: rate: {rate}; accepted: above 0, as a multiple of the peak learning rate")


def line(row: Row, variant: str, tuned: bool, tokens: int) -> Row:
    """A row of `extrapolation` as one of recovery."""
    rest = {k: v for k, v in row.items() if k in ("ratio", "length", "loss_nats", "last_nats", "reason")}
    return {"variant": variant, "tuned": tuned, **rest, "tokens_tuned": tokens}


def tune(subject: Subject, changes: Mapping[str, Any], tuning: Tuning) -> tuple[Subject | str, int]:
    """The variant after tuning, or why there is none; and the tokens that it took."""
    try:
        tried = subject.variant(change(subject.spec, changes, "variant"))
    except ValueError as error:
        return f"refused: {error}", 0
    if not tuning.share:
        return tried, 0
    if (reason := tried.refusal(tuning.length)) is not None:
        return reason, 0
    assert subject.dataset is not None  # its text was read before
    try:
        trained = train_further(longer(tried, tuning.length), tuning.recipe(subject), subject.dataset)
    except ValueError as error:
        return f"not tuned: {error}", 0
    return replace(tried, model=trained.model, spec=trained.model.spec), trained.tokens


def longer(subject: Subject, length: int) -> LM:
    """The same weights with a context of at least `length`, which the recipe's rows must not exceed."""
    context = max(subject.spec.context, length)
    return subject.variant(change(subject.spec, {"model.context": context})).model
