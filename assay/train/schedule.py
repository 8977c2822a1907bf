"""Learning-rate schedules in closed form: the factor of a step depends on the step and the length of the run alone."""

from __future__ import annotations

import math

from assay.train.recipe import ScheduleSpec


def in_steps(share: float, steps: int) -> int:
    """A share of the run (below 1) or a number of steps (from 1 on), in steps."""
    return int(share) if share >= 1 else round(share * steps)


def factor(spec: ScheduleSpec, step: int, steps: int) -> float:
    """The multiple of the peak learning rate for step 0 .. steps-1.

    With w warmup steps: (step + 1) / w until w. Then, with p = (step + 1 - w) / (steps - w), which ends at 1,
    cosine: final + (1 - final) (1 + cos(pi p)) / 2. linear: 1 - (1 - final) p. constant: 1.
    wsd: 1 until the last d steps, then 1 - (1 - final) q with q = (step + 1 - (steps - d)) / d.
    """
    warmup = min(in_steps(spec.warmup, steps), steps)
    if step < warmup:
        return (step + 1) / warmup
    place = (step + 1 - warmup) / (steps - warmup)
    if spec.kind == "cosine":
        return spec.final + (1 - spec.final) * (1 + math.cos(math.pi * place)) / 2
    if spec.kind == "linear":
        return 1 - (1 - spec.final) * place
    if spec.kind == "constant":
        return 1.0
    decay = min(in_steps(spec.decay, steps), steps - warmup)
    into = step + 1 - (steps - decay)
    return 1 - (1 - spec.final) * into / decay if into > 0 else 1.0
