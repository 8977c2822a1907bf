"""The time of one step of an engine, as a line in what the step has to do, and its fit to measured steps. No torch.

t = overhead + max(weights, token * tokens) + sequence * decodes + context * stored tokens read + pair * prefill pairs,
and `prompts` more where any are read.

A step reads the weights once, however many tokens it brings, until arithmetic takes longer (the roofline); it reads
what its sequences have stored (Shazeer 2019, arXiv 1911.02150, section 2.4); a prompt's tokens look at each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field
from scipy.optimize import minimize_scalar, nnls

from assay.spec.base import Spec
from assay.spec.load import find, read_mapping, validate

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Work:
    """What one step does. prefill: tokens of prompts; decodes: sequences that get one token each; context: tokens that
    all its sequences had stored before the step; pairs: of prefill, a token and another (or itself) that it sees."""

    prefill: int
    decodes: int
    context: int
    pairs: float

    @property
    def tokens(self) -> int:
        return self.prefill + self.decodes

    def __add__(self, other: Work) -> Work:
        pairs = self.pairs + other.pairs
        return Work(self.prefill + other.prefill, self.decodes + other.decodes, self.context + other.context, pairs)


def chunk_pairs(tokens: int, past: int = 0) -> float:
    """Pairs of a chunk of a prompt, `past` tokens of which were read before."""
    return tokens * past + tokens * (tokens + 1) / 2


class StepCost(Spec):
    """Seconds: overhead, a step; weights, to read them once; token, of arithmetic; sequence, a decode's bookkeeping and
    the state that does not grow; context, to read one stored token; pair, of prefill's attention; prompts, what a step
    that reads some takes more than one that reads none: their rows pass through attention in calls of their own."""

    overhead: float = Field(default=0.0, ge=0)
    weights: float = Field(default=0.0, ge=0)
    token: float = Field(default=0.0, ge=0)
    sequence: float = Field(default=0.0, ge=0)
    context: float = Field(default=0.0, ge=0)
    pair: float = Field(default=0.0, ge=0)
    prompts: float = Field(default=0.0, ge=0)

    def seconds(self, work: Work) -> float:
        reading = max(self.weights, self.token * work.tokens)
        own = self.sequence * work.decodes + self.context * work.context + self.pair * work.pairs
        return self.overhead + reading + own + (self.prompts if work.prefill else 0.0)

    def prompt(self, tokens: int) -> float:
        """A prompt alone, in one step, nothing of it stored: the least time to a first token."""
        return self.seconds(Work(tokens, 0, 0, chunk_pairs(tokens)))

    @staticmethod
    def fit(rows: Iterable[Mapping[str, Any]]) -> Fit:
        """Rows of prefill_tokens, decodes, context, seconds, and pairs where they are known (without them the prompt
        tokens of a step count as one whole prompt). ValueError below eight rows of more than 0 seconds."""
        steps = [(work_of(row), float(row["seconds"])) for row in rows]
        if len(steps) < 8 or min(seconds for _, seconds in steps) <= 0:
            raise ValueError(f"{len(steps)} steps; accepted: eight or more to fit a cost to, all above 0 seconds")
        return _fit([work for work, _ in steps], np.asarray([seconds for _, seconds in steps]))


def work_of(row: Mapping[str, Any]) -> Work:
    prefill = int(row["prefill_tokens"])
    return Work(prefill, int(row["decodes"]), int(row["context"]), float(row.get("pairs", chunk_pairs(prefill))))


@dataclass(frozen=True)
class Fit:
    """r2: of the seconds. errors: fitted / measured - 1 of each row, in their order."""

    cost: StepCost
    r2: float
    errors: tuple[float, ...]

    @classmethod
    def of(cls, cost: StepCost, works: Sequence[Work], seconds: Array) -> Fit:
        fitted = np.asarray([cost.seconds(work) for work in works])
        spread = float(np.sum((seconds - seconds.mean()) ** 2))
        r2 = 1 - float(np.sum((seconds - fitted) ** 2)) / spread if spread > 0 else 0.0
        return cls(cost, r2, tuple(float(e) for e in fitted / seconds - 1))

    def as_json(self) -> dict[str, Any]:
        size = np.abs(self.errors)
        names = ("mean_error", "p90_error", "worst_error", "bias")
        values = (size.mean(), np.percentile(size, 90), size.max(), np.mean(self.errors))
        found = {name: float(value) for name, value in zip(names, values)}
        return {"rows": len(self.errors), "r2": self.r2, **found, "cost": self.cost.model_dump()}


def _fit(works: Sequence[Work], seconds: Array) -> Fit:
    """Least squares of relative errors, no coefficient below zero (Lawson and Hanson 1974, chapter 23). The knee, the
    tokens at which arithmetic passes the reading of weights, is searched for: given it, the rest is linear. Where times
    scatter such a fit lies below their mean; what queues feel is their sum, so that is made equal."""
    tokens = np.asarray([work.tokens for work in works], float)
    others = np.asarray([(work.decodes, work.context, work.pairs, work.prefill > 0) for work in works], float)

    def solve(knee: float) -> tuple[float, Array]:
        columns = np.column_stack([np.ones(len(works)), np.maximum(tokens, knee), others])
        scale = np.maximum(columns.max(0), 1.0)  # pairs and ones in one matrix would be badly conditioned
        found, miss = nnls(columns / scale / seconds[:, None], np.ones(len(works)))
        return miss, found / scale

    knee = _least(lambda at: solve(at)[0], [0.0, *np.unique(tokens)])
    names = ("overhead", "token", "sequence", "context", "pair", "prompts")
    found = dict(zip(names, solve(knee)[1], strict=True))
    found["weights"] = found["token"] * knee
    raw = StepCost(**found)
    whole = float(seconds.sum()) / sum(raw.seconds(work) for work in works)
    return Fit.of(StepCost(**{name: value * whole for name, value in found.items()}), works, seconds)


def _least(miss: Callable[[float], float], at: Sequence[float]) -> float:
    """Where the miss is least: at one of some places, spread over all, or between the best one's neighbours."""
    tried = [at[i] for i in np.unique(np.linspace(0, len(at) - 1, 40).round().astype(int))]
    best = int(np.argmin([miss(knee) for knee in tried]))
    low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
    if low == high:
        return float(low)
    inside = minimize_scalar(miss, bounds=(low, high), method="bounded")
    return float(inside.x) if inside.fun < miss(tried[best]) else float(tried[best])


class Machine(Spec):
    """One replica: the time of its steps, and what it holds. capacity: tokens of state; null is without end.
    state_bytes: of a token. link_byte_s: to another machine; host_byte_s: to and from the host, for swapping."""

    name: str = "machine"
    step: StepCost
    capacity: int | None = Field(default=None, ge=1)
    state_bytes: float = Field(default=0.0, ge=0)
    link_byte_s: float = Field(default=25e9, gt=0)
    host_byte_s: float = Field(default=25e9, gt=0)

    def ship(self, tokens: int) -> float:
        """Seconds to send the state of so many tokens to another machine."""
        return tokens * self.state_bytes / self.link_byte_s

    def swap(self, tokens: int) -> float:
        return tokens * self.state_bytes / self.host_byte_s

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.model_dump(), sort_keys=False), encoding="utf-8")


def load_machine(source: str | Path) -> Machine:
    """A shipped name or a YAML file."""
    return validate(Machine, read_mapping(find(source, "simulate")), str(source))
