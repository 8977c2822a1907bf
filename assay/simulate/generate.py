"""Traces that are drawn: arrivals of a Poisson or a bursty process, lengths like those of public traces. No torch.

Lengths are lognormal with the medians and means of Azure's 2023 traces (Patel et al. 2024, arXiv 2311.18677; medians of
prompt and reply 1469 and 13 for code, 1020 and 129 for conversation), which gives the spread: mean / median =
exp(sigma^2 / 2). `sessions` are conversations in the shape of Mooncake's traces (Qin et al. 2025, arXiv 2407.00079):
every turn repeats all that was said, after one of a few system prompts that many conversations share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from assay.simulate.trace import BLOCK, Arrival
from assay.spec.base import Spec

Draws = np.random.Generator


class Lengths(Spec):
    """Lognormal numbers of tokens, rounded, from 1 to `most`."""

    median: float = Field(gt=0)
    mean: float = Field(gt=0)
    most: int = Field(default=16_384, ge=1)

    def draw(self, draws: Draws, count: int) -> list[int]:
        sigma = math.sqrt(2 * math.log(max(self.mean / self.median, 1.0)))
        found = np.rint(draws.lognormal(math.log(self.median), sigma, count))
        return [int(n) for n in np.clip(found, 1, self.most)]


class Workload(Spec):
    """Requests that share nothing. cv: the coefficient of variation of the gaps between arrivals; 1 is a Poisson
    process, above it a Gamma process that comes in bursts."""

    prompt: Lengths
    new: Lengths
    cv: float = Field(default=1.0, gt=0)


class Sessions(Spec):
    """Conversations. turns: mean of a geometric number; think: mean pause [s] between a turn's end and the next, as a
    client without a server would see it; systems: so many system prompts of `system` tokens, the k-th 1/k as likely as
    the first."""

    user: Lengths = Lengths(median=300, mean=700)
    reply: Lengths = Lengths(median=129, mean=211)
    turns: float = Field(default=5.0, ge=1)
    think: float = Field(default=30.0, gt=0)
    systems: int = Field(default=8, ge=1)
    system: int = Field(default=1536, ge=0)
    cv: float = Field(default=1.0, gt=0)


CODE = Workload(prompt=Lengths(median=1469, mean=2048), new=Lengths(median=13, mean=27.9))
CONVERSATION = Workload(prompt=Lengths(median=1020, mean=1155), new=Lengths(median=129, mean=211))
Name = Literal["code", "conversation", "sessions"]
NAMES: tuple[Name, ...] = ("code", "conversation", "sessions")


def generate(name: str, count: int, rate: float, seed: int, cv: float = 1.0) -> list[Arrival]:
    """`count` requests at `rate` a second on average, drawn from the seed alone."""
    if count < 1 or not 0 < rate < math.inf or cv <= 0 or seed < 0:
        raise ValueError(
            f"requests {count}, rate {rate}, cv {cv}, seed {seed}; accepted: above 0, and a seed of at least 0"
        )
    if name == "sessions":
        return sessions(Sessions(cv=cv), count, rate, seed)
    if name not in NAMES:
        raise ValueError(f"trace: {name!r}; accepted: a .csv or .jsonl file, or {', '.join(NAMES)}")
    kind = CODE if name == "code" else CONVERSATION
    return independent(kind.model_copy(update={"cv": cv}), count, rate, seed)


def arrivals(draws: Draws, count: int, rate: float, cv: float) -> list[float]:
    """Times [s] from 0, after gaps of mean 1 / rate: exponential for cv 1, else Gamma of shape 1 / cv^2."""
    shape = 1 / cv**2
    gaps = draws.gamma(shape, 1 / (shape * rate), count)
    return [float(t) for t in np.cumsum(gaps) - gaps[0]]


def independent(kind: Workload, count: int, rate: float, seed: int) -> list[Arrival]:
    draws = np.random.default_rng(seed)
    times = arrivals(draws, count, rate, kind.cv)
    return [Arrival(*one) for one in zip(times, kind.prompt.draw(draws, count), kind.new.draw(draws, count))]


def sessions(kind: Sessions, count: int, rate: float, seed: int) -> list[Arrival]:
    """The first `count` turns by time: conversations start at rate / turns a second. Before the first has ended fewer
    turns are under way than later; the numbers of blocks are chains, as in Mooncake's traces."""
    draws = np.random.default_rng(seed)
    starts = arrivals(draws, count, rate / kind.turns, kind.cv)
    likely = 1 / np.arange(1, kind.systems + 1)
    numbers: dict[tuple[object, ...], int] = {}
    found: list[Arrival] = []
    for talk, start in enumerate(starts):
        system = int(draws.choice(kind.systems, p=likely / likely.sum()))
        for turn, (at, prompt, new) in enumerate(_turns(kind, draws, start)):
            keys = _keys(kind, system, talk, turn, prompt)
            found.append(Arrival(at, prompt, new, tuple(numbers.setdefault(key, len(numbers)) for key in keys)))
    return sorted(found, key=lambda one: one.at)[:count]


def _turns(kind: Sessions, draws: Draws, at: float) -> Iterator[tuple[float, int, int]]:
    """Of one conversation: when each turn comes, and the tokens of its prompt and of its reply."""
    count = int(draws.geometric(1 / kind.turns))
    pauses = draws.exponential(kind.think, count)
    said = kind.system
    for user, reply, pause in zip(kind.user.draw(draws, count), kind.reply.draw(draws, count), pauses):
        yield at, said + user, reply
        said, at = said + user + reply, at + float(pause)


def _keys(kind: Sessions, system: int, talk: int, turn: int, prompt: int) -> Iterator[tuple[object, ...]]:
    """What each block holds: those within the system prompt are the system's, later full ones the conversation's, and a
    last one that is not full is the turn's alone."""
    shared, full = kind.system // BLOCK, prompt // BLOCK
    for place in range(full):
        yield ("system", system, place) if place < shared else ("talk", talk, place)
    if prompt % BLOCK:
        yield "turn", talk, turn
