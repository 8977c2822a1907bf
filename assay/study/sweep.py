"""What a learning-rate sweep found: a curve and an optimum for each arm, and whether one rate serves them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from assay.spec.result import Result
from assay.study.trials import Stage

AGREEMENT = 2.0
"""The largest ratio of two arms' best rates at which one rate serves both: it costs each less than its noise."""


@dataclass(frozen=True)
class Curve:
    """Mean loss over seeds by learning rate; None where a run diverged. Rates rise."""

    rates: tuple[float, ...]
    losses: tuple[float | None, ...]

    @property
    def best(self) -> int | None:
        """The place of the smallest loss; None where every run diverged."""
        found = [(loss, i) for i, loss in enumerate(self.losses) if loss is not None]
        return min(found)[1] if found else None

    @property
    def optimum(self) -> float | None:
        """The lowest point of the parabola through the best rate and its neighbours, in the logarithm of the rate;
        the best rate itself at an end of the sweep, or beside a run that diverged."""
        i = self.best
        if i is None or i in (0, len(self.rates) - 1):
            return None if i is None else self.rates[i]
        left, middle, right = self.losses[i - 1 : i + 2]
        if left is None or middle is None or right is None:
            return self.rates[i]
        x = [math.log(rate) for rate in self.rates[i - 1 : i + 2]]
        (p, q), (down, up) = (x[1] - x[0], x[2] - x[1]), (left - middle, right - middle)
        if down * q + up * p <= 0.0:
            return self.rates[i]
        return math.exp(x[1] + (down * q * q - up * p * p) / (2.0 * (down * q + up * p)))

    @property
    def is_at_an_end(self) -> bool:
        return self.best in (0, len(self.rates) - 1)


def curves(results: Iterable[Result], stage: Stage) -> dict[str, Curve]:
    """arm -> curve, from the stage's `sweep` lines of single runs."""
    found: dict[str, dict[float, list[float | None]]] = {}
    for r in results:
        if r.kind == "sweep" and r.study == stage.name and r.arm is not None and r.seed is not None:
            loss = r.values["loss_nats"]
            known = float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None
            found.setdefault(r.arm, {}).setdefault(float(r.values["learning_rate"]), []).append(known)  # type: ignore[arg-type]
    return {arm: _curve(found[arm]) for arm in stage.arms if arm in found}


def _curve(points: Mapping[float, Sequence[float | None]]) -> Curve:
    rates = tuple(sorted(points))
    return Curve(rates, tuple(_mean(points[rate]) for rate in rates))


def _mean(losses: Sequence[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    return math.fsum(finite) / len(finite) if len(finite) == len(losses) else None


def best_rates(results: Iterable[Result], stage: Stage) -> dict[str, float]:
    """arm -> the rate of its sweep with the smallest loss: one that was tried, not a point between."""
    found = curves(results, stage)
    return {arm: curve.rates[best] for arm, curve in found.items() if (best := curve.best) is not None}


def sweep_results(results: Iterable[Result], stage: Stage, about: Result) -> list[Result]:
    """One `sweep` line an arm; `about` lends version, commit, device and recipe digest."""
    out = []
    for arm, curve in curves(results, stage).items():
        values = {"learning_rate": [*curve.rates], "loss_nats": [*curve.losses], "optimum": curve.optimum}
        update = {"kind": "sweep", "arm": arm, "seed": None, "spec_digest": stage.models[arm][1], "values": values}
        out.append(about.model_copy(update=update))
    return out


def note(results: Iterable[Result], stage: Stage) -> str:
    """Whether the arms' best rates agree within a factor of two, with the rates; empty without a sweep."""
    found = {arm: c for arm, c in curves(results, stage).items() if c.optimum is not None}
    if not found:
        return ""
    best = {arm: float(curve.optimum or 0.0) for arm, curve in found.items()}
    said = ", ".join(f"{arm} {rate:.2g}" + _end(found[arm]) for arm, rate in best.items())
    ratio = max(best.values()) / min(best.values())
    if len(found) == 1:
        verdict = "Learning-rate sweep"
    elif ratio <= AGREEMENT and any(curve.is_at_an_end for curve in found.values()):
        verdict = "Whether the arms' best learning rates agree is open, since some lie at an end of the sweep"
    elif ratio <= AGREEMENT:
        verdict = f"The arms' best learning rates agree within a factor of two ({ratio:.2g})"
    else:
        verdict = f"The arms' best learning rates differ by a factor of {ratio:.2g}"
    if stage.rates:
        tail = ". Every arm was trained with the best rate of its own sweep"
    elif ratio > AGREEMENT:
        tail = f". All were trained with {stage.rate:g}, so a difference between them may be the rate's"
    else:
        tail = f". All were trained with {stage.rate:g}"
    return f"{verdict}: {said}{tail}."


def _end(curve: Curve) -> str:
    if not curve.is_at_an_end:
        return ""
    return " (the smallest tried)" if curve.best == 0 else " (the largest tried)"
