"""Training by the clock: tokens a second, and what share of the machine's arithmetic they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from assay.cost.bill import Question, bill
from assay.data.corpora import CorpusSpec
from assay.measure.machine import SIZE, matmul_seconds, seconds
from assay.spec.model import ModelSpec
from assay.train.fit import check
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.precision import resolve
from assay.train.recipe import BatchSpec, EvaluationSpec, Precision, Recipe
from assay.train.utilisation import train_flops_per_token

WARM = 2
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Utilisation:
    """train_tok_s: of the median step. mfu: (6 params + 12 layers d_model seq) tok/s over the rate of a product of 2048
    in the dtype of the run (`of`), measured in this process between
    the steps, the fastest of all. exact_utilisation: the same with the
    FLOPs that the mathematics needs, visible pairs and no recomputation. matmul_gflop_s: both rates, in GFLOP/s."""

    train_tok_s: float
    mfu: float
    exact_utilisation: float
    of: str
    matmul_gflop_s: dict[str, float]
    step_s: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "train_tok_s": self.train_tok_s,
            "mfu": self.mfu,
            "exact_utilisation": self.exact_utilisation,
            "mfu_of": self.of,
            "mfu_best_step": self.mfu * median(self.step_s) / min(self.step_s),
            "matmul_gflop_s": self.matmul_gflop_s,
            "step_s_p50": median(self.step_s),
            "step_s_best": min(self.step_s),
            "steps": len(self.step_s),
        }


def bench_recipe(batch: int, length: int, precision: Precision) -> Recipe:
    """Rows of one running text, so that none is cut into documents; what is in it changes no time."""
    text = CorpusSpec(kind="generated", documents=1, document_bytes=max(1 << 14, 4 * batch * length), valid_one_in=0)
    return Recipe(
        data=text,
        batch=BatchSpec(rows=batch, length=length),
        precision=precision,
        evaluation=EvaluationSpec(tokens=0),
    )


def utilisation(
    spec: ModelSpec,
    recipe: Recipe,
    device: torch.device,
    steps: int,
    compiled: bool = False,
    tell: Callable[[int], None] = lambda step: None,
) -> Utilisation:
    """Whole optimiser steps of the training loop, two to warm up and `steps` by the clock."""
    if steps < 1:
        raise ValueError(f"steps: {steps}; accepted: 1 or more")
    recipe = resolve(recipe, device)
    with TemporaryDirectory() as cache:
        data = dataset(recipe, Path(cache))
        check(spec, recipe, data)
        learner = Learner(spec, recipe, data, device, compiled)
        learner.check_memory()
        dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        products = {kind: matmul_seconds(kind, device) for kind in SHORT}
        found: list[float] = []
        for step in range(WARM + steps):
            took = seconds(lambda step=step: learner.step(step, WARM + steps), device)  # type: ignore[misc]
            found += [took] if step >= WARM else []
            # Between all steps, and the fastest counts: a machine that others slowed down would flatter the share.
            products[dtype] = min(products[dtype], matmul_seconds(dtype, device, 0.0))
            tell(step)
    rates = {kind: 2 * SIZE**3 / took for kind, took in products.items()}
    tok_s = recipe.batch.tokens / median(found)
    flops = train_flops_per_token(spec, recipe.batch.length)
    exact = bill(spec, Question(recipe.batch.length)).flops["train_per_token"]
    return Utilisation(
        tok_s,
        flops * tok_s / rates[dtype],
        exact * tok_s / rates[dtype],
        f"the {SHORT[dtype]} matmul rate",
        {SHORT[dtype]: round(rate / 1e9, 1) for dtype, rate in rates.items()},
        tuple(found),
    )
