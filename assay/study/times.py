"""How long a plan takes, from a measured rate, and the scale that fits it into a time budget."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from assay.measure.topics import seconds as measuring_seconds
from assay.study.claims import TRAINING
from assay.study.plan import Plan
from assay.study.trials import Materials, Trial

START_S = 5.0
"""Until a pool's workers have imported torch and opened the text."""
TRIAL_OVERHEAD_S = 0.5
VALIDATION_COST = 1 / 3
"""Of a token that is read only: a forward pass is a third of a training step."""


def expected_seconds(plan: Plan, materials: Materials, left: Collection[Trial] | None = None) -> list[float]:
    """For each trial, from the injected rate, asked once for each model and recipe.

    left: the trials that still have to run; the others take no time, and a model without any is not asked about.
    """
    if materials.rate is None:
        raise ValueError("no rate was measured: expected times are unknown")
    rates: dict[tuple[str, str], float] = {}
    wanted = None if left is None else {trial.key for trial in left}
    out = []
    for trial, fixed in zip(plan.trials, fixed_seconds(plan)):
        if wanted is not None and trial.key not in wanted:
            out.append(0.0)
            continue
        if trial.key[:2] not in rates:
            rates[trial.key[:2]] = materials.rate(trial.spec, trial.recipe)
        out.append((trial.tokens + _validation(trial)) / rates[trial.key[:2]] + fixed)
    return out


def fixed_seconds(plan: Plan) -> list[float]:
    """For each trial, what no scaling of its tokens makes shorter."""
    return [TRIAL_OVERHEAD_S + _measuring(trial) for trial in plan.trials]


def _measuring(trial: Trial) -> float:
    """What is measured during training is measured at every validation but the last: the end is counted by itself."""
    times = {True: max(0, _evaluation(trial)["points"] - 1), False: 1}
    asked = [(name.removeprefix(f"{TRAINING}."), name, options) for name, options in trial.measurements]
    return sum(measuring_seconds(topic, options) * times[topic != name] for topic, name, options in asked)


def _evaluation(trial: Trial) -> dict[str, int]:
    return trial.recipe.get("evaluation") or {"tokens": 0, "points": 0}


def _validation(trial: Trial) -> float:
    """Validation, in tokens of training."""
    asked = _evaluation(trial)
    return float(asked["tokens"] * asked["points"] * VALIDATION_COST)


def wall_seconds(seconds: list[float], workers: int) -> float:
    """When the last trial ends if each worker takes the next trial in order."""
    free = [0.0] * max(1, min(workers, len(seconds) or 1))
    for s in seconds:
        heapq.heapreplace(free, free[0] + s)
    return max(free)


def fit_scale(seconds: list[float], limit: float, workers: int, fixed: Sequence[float] | None = None) -> float:
    """The factor, at most 1, on every trial's tokens that fits `seconds` into `limit`; never one arm alone.

    fixed: what part of each trial's seconds no scaling makes shorter; its overhead alone if null.
    """
    if wall_seconds(seconds, workers) <= limit:
        return 1.0
    fixed = [TRIAL_OVERHEAD_S] * len(seconds) if fixed is None else list(fixed)
    if wall_seconds(fixed, workers) >= limit:
        raise ValueError(
            f"{len(seconds)} trials on {workers} workers need more than {limit:.0f} s before any token is trained; "
            "take fewer seeds or arms, or a larger budget"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        scaled = [least + (s - least) * middle for s, least in zip(seconds, fixed)]
        low, high = (middle, high) if wall_seconds(scaled, workers) <= limit else (low, middle)
    # Two digits: a plan that is asked for again must not differ by the noise of its measured rate.
    return max(float(f"{low:.2g}"), 1e-6)
