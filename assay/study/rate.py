"""How fast one worker trains: measured before a study, so that its times are not a guess."""

from __future__ import annotations

import time
from typing import Any

import torch

from assay.spec.load import validate
from assay.spec.model import ModelSpec
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.precision import resolve
from assay.train.recipe import Recipe


def training_rate(model: dict[str, Any], recipe: dict[str, Any], seconds: float = 0.3) -> float:
    """Tokens a second of optimiser steps on one thread: two to warm up, then as many as fit into `seconds`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec, how = validate(ModelSpec, model, "model"), resolve(validate(Recipe, recipe, "recipe"), "cpu")
        learner = Learner(spec, how, dataset(how), torch.device("cpu"))
        for number in range(2):
            learner.step(number, 1000)
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds or steps < 2:
            learner.step(2 + steps, 1000)
            steps += 1
        return steps * how.batch.tokens / spent
    finally:
        torch.set_num_threads(threads)
