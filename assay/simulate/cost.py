"""The time of one step of an engine, as a line in what the step has to do, and its fit to measured steps. No torch.

t = overhead + max(weights, token * tokens) + sequence * decodes + context * stored tokens read + pair * prefill pairs,
and `prompts` more where any are read, `fresh` where sequences are met that did not decode together before.

A step reads the weights once, however many tokens it brings, until arithmetic takes longer (the roofline); it reads
what its sequences have stored (Shazeer 2019, arXiv 1911.02150, section 2.4); a prompt's tokens look at each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    all its sequences had stored before the step; pairs: of prefill, a token and another (or itself) that it sees;
    fresh: whether it is one of the first `MEETING` that bring the same sequences a token each and read no prompt."""

    prefill: int
    decodes: int
    context: int
    pairs: float
    fresh: int = 0

    @property
    def tokens(self) -> int:
        return self.prefill + self.decodes

    def __add__(self, other: Work) -> Work:
        pairs = self.pairs + other.pairs
        fresh = self.fresh + other.fresh
        return Work(
            self.prefill + other.prefill, self.decodes + other.decodes, self.context + other.context, pairs, fresh
        )


MEETING = 2
"""Steps of a new batch until it is known: an engine that records its steps runs one, and records the next."""


class Company:
    """Who decodes together from step to step, as far as counts tell: whoever comes has a prompt, and who leaves is
    missing."""

    def __init__(self) -> None:
        self._decodes = self._since = 0

    def fresh(self, prefill: int, decodes: int) -> int:
        """`Work.fresh` of the next step; called for each in turn."""
        same = not prefill and decodes == self._decodes
        self._decodes, self._since = (0, 0) if prefill else (decodes, self._since + 1 if same else 1)
        return int(0 < self._since <= MEETING)


def chunk_pairs(tokens: int, past: int = 0) -> float:
    """Pairs of a chunk of a prompt, `past` tokens of which were read before."""
    return tokens * past + tokens * (tokens + 1) / 2


class StepCost(Spec):
    """Seconds: overhead, a step; weights, to read them once; token, of arithmetic; sequence, a decode's bookkeeping and
    the state that does not grow; context, to read one stored token; pair, of prefill's attention; prompts, what a step
    that reads some takes more than one that reads none: their rows pass through attention in calls of their own; fresh,
    what a step takes more whose sequences have not decoded together before."""

    overhead: float = Field(default=0.0, ge=0)
    weights: float = Field(default=0.0, ge=0)
    token: float = Field(default=0.0, ge=0)
    sequence: float = Field(default=0.0, ge=0)
    context: float = Field(default=0.0, ge=0)
    pair: float = Field(default=0.0, ge=0)
    prompts: float = Field(default=0.0, ge=0)
    fresh: float = Field(default=0.0, ge=0)

    def seconds(self, work: Work) -> float:
        reading = max(self.weights, self.token * work.tokens)
        own = self.sequence * work.decodes + self.context * work.context + self.pair * work.pairs
        return self.overhead + reading + own + (self.prompts if work.prefill else 0.0) + self.fresh * work.fresh

    def prompt(self, tokens: int) -> float:
        """A prompt alone, in one step, nothing of it stored: the least time to a first token."""
        return self.seconds(Work(tokens, 0, 0, chunk_pairs(tokens)))

    @staticmethod
    def fit(rows: Iterable[Mapping[str, Any]]) -> Fit:
        """Rows of prefill_tokens, decodes, context, seconds, and pairs where they are known (without them the prompt
        tokens of a step count as one whole prompt), in the order in which they ran. ValueError below eight rows of more
        than 0 seconds."""
        rows = list(rows)
        seconds = np.asarray([float(row["seconds"]) for row in rows])
        if len(rows) < 8 or seconds.min() <= 0:
            raise ValueError(f"{len(rows)} steps; accepted: eight or more to fit a cost to, all above 0 seconds")
        return _fit(works_of(rows), seconds)


def works_of(rows: Iterable[Mapping[str, Any]]) -> list[Work]:
    """What the steps of a log did, in the order in which they ran."""
    company = Company()
    return [_work_of(row, company) for row in rows]


def _work_of(row: Mapping[str, Any], company: Company) -> Work:
    prefill, decodes = int(row["prefill_tokens"]), int(row["decodes"])
    pairs = float(row.get("pairs", chunk_pairs(prefill)))
    return Work(prefill, decodes, int(row["context"]), pairs, company.fresh(prefill, decodes))


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
    """Least squares of errors relative to what is fitted, no coefficient below zero (Lawson and Hanson 1974, chapter
    23), solved a few times over (McCullagh and Nelder 1989, section 8.2.4: a deviation that grows with the mean).
    Relative to what was measured, steps that scatter would be fitted below their mean, and the most those that scatter
    most. The knee, the tokens at which arithmetic passes the reading of weights, is searched for: given it, the rest is
    linear. What queues feel is the sum of all, so that is made equal."""
    tokens = np.asarray([work.tokens for work in works], float)
    others = np.asarray([(w.decodes, w.context, w.pairs, w.prefill > 0, w.fresh) for w in works], float)

    def solve(knee: float, size: Array) -> tuple[float, Array]:
        columns = np.column_stack([np.ones(len(works)), np.maximum(tokens, knee), others])
        scale = np.maximum(columns.max(0), 1.0)  # pairs and ones in one matrix would be badly conditioned
        found, left = nnls(columns / scale / size[:, None], seconds / size)
        return left, found / scale

    def miss(size: Array, knee: float) -> float:
        return solve(knee, size)[0]

    size = seconds
    for _ in range(ROUNDS):
        knee = _least(partial(miss, size), [0.0, *np.unique(tokens)])
        cost = _cost(knee, solve(knee, size)[1])
        size = np.asarray([cost.seconds(work) for work in works])
    whole = float(seconds.sum() / size.sum())
    return Fit.of(StepCost(**{name: value * whole for name, value in cost.model_dump().items()}), works, seconds)


ROUNDS = 6


def _cost(knee: float, found: Array) -> StepCost:
    names = ("overhead", "token", "sequence", "context", "pair", "prompts", "fresh")
    values = dict(zip(names, found, strict=True))
    return StepCost(**values, weights=values["token"] * knee)


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
