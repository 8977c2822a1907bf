"""Prefill and decode by the clock, with the cache and without it, and the roofline they stand under."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from assay.cache import Size, Slot, predict
from assay.cost.bill import Question, bill
from assay.cost.hardware import weights_read
from assay.engine.request import SamplingParams
from assay.engine.runner import CHUNK, Runner
from assay.engine.sampler import Settings, sample
from assay.measure.machine import matmul_flop_s, memory_byte_s, seconds, wait
from assay.model.lm import LM, state_table
from assay.ops.packed import held_bytes
from assay.ops.step import rows_step

LEAST, BURST = 3, 4
Found = TypeVar("Found")


@dataclass(frozen=True)
class Load:
    """`batch` sequences of `context` tokens, the last `new` of them decoded; cache: kept, or all read again a token.

    read: tokens of the prefill that is timed by itself; null is the whole context.
    """

    batch: int
    context: int
    new: int
    cache: bool = True
    read: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch", self.batch, 1), ("new tokens", self.new, 1), ("context", self.context, 2)):
            if value < least:
                raise ValueError(f"{name}: {value}; accepted: {least} or more")
        if self.new >= self.context:
            raise ValueError(f"new tokens: {self.new}; accepted: fewer than the context, {self.context}")

    @property
    def prompt(self) -> int:
        return self.context - self.new

    @property
    def reading(self) -> int:
        return self.context if self.read is None else self.read


@dataclass(frozen=True)
class Times:
    """Seconds: reading the prefill, until its first token is chosen, and between two tokens (many)."""

    prefill: float
    first: float
    gaps: tuple[float, ...]

    @property
    def gap(self) -> float:
        return median(self.gaps)

    def late(self, share: float) -> float:
        return float(np.percentile(self.gaps, 100 * share))


def warmed(step: Callable[[], float]) -> list[float]:
    """Some steps in a row without the first one, which finds the processor's caches full of another load's data."""
    return [step() for _ in range(BURST + 1)][1:]


def in_turns(calls: Sequence[Callable[[], list[Found]]], budget_s: float) -> list[list[Found]]:
    """What each call found. The call that has had the least time is next, until the budget is spent and each has found
    three: what slows the machine for a while meets all of them alike, and each has the same time."""
    found: list[list[Found]] = [[] for _ in calls]
    spent = [0.0] * len(calls)
    end = time.perf_counter() + budget_s
    while True:
        late = time.perf_counter() >= end
        waiting = [i for i, values in enumerate(found) if not late or len(values) < LEAST]
        if not waiting:
            return found
        i = min(waiting, key=spent.__getitem__)
        start = time.perf_counter()
        found[i] += calls[i]()
        spent[i] += time.perf_counter() - start


def timed(loads: Sequence[Serving], budget_s: float) -> list[Times]:
    """Of each load three prefills or more within a third of the budget, then decoding within the rest, in turns. The
    caches of all loads exist at once."""
    if not loads:
        return []
    for load in loads:
        load.prefill()
    prefills = in_turns([load.prefill for load in loads], budget_s / 3)
    gaps = in_turns([load.decode for load in loads], budget_s * 2 / 3)
    return [
        Times(median(read for read, _ in reads), median(first for _, first in reads), tuple(steps))
        for reads, steps in zip(prefills, gaps, strict=True)
    ]


class Serving:
    """A model under a load, driven as the engine drives it: greedy sampling included, text decoding not."""

    def __init__(self, model: LM, load: Load) -> None:
        self.model, self.load = model.eval(), load
        self.device = next(model.parameters()).device
        self.greedy = Settings.of([SamplingParams(temperature=0.0)] * load.batch, self.device)
        self.uniforms = torch.zeros(load.batch, dtype=torch.float64, device=self.device)
        draws = torch.Generator().manual_seed(0)
        self.ids = torch.randint(model.spec.vocab, (load.batch, load.context), generator=draws)
        self.opened: tuple[Runner, list[Slot]] | None = None
        self.tokens = self._tokens()

    def choose(self, logits: Tensor) -> list[list[int]]:
        return [[token] for token in sample(logits, self.greedy, self.uniforms, None).tolist()]

    def measure(self, budget_s: float) -> Times:
        return timed([self], budget_s)[0]

    def prefill(self) -> list[tuple[float, float]]:
        """Seconds of reading the prefill, and of that with the choice of a token. What was read is kept to decode."""
        ids, rows = self.ids[:, : self.load.reading], self.ids[:, : self.load.reading].tolist()
        self.opened = None  # its memory first
        self.opened = self._open() if self.load.cache else None
        wait(self.device)
        start = time.perf_counter()
        logits = self.opened[0].feed(self.opened[1], rows) if self.opened is not None else self._again(ids)
        wait(self.device)
        middle = time.perf_counter()
        self.choose(logits)
        return [(middle - start, time.perf_counter() - start)]

    def decode(self) -> list[float]:
        """Seconds of each of the next few tokens; without a cache, of the next."""
        if not self.load.cache:
            return [seconds(next(self.tokens), self.device)]
        return warmed(lambda: seconds(next(self.tokens), self.device))

    def _tokens(self) -> Iterator[Callable[[], object]]:
        """The steps from the prompt to the full context, again and again."""
        while True:
            yield from self._steps()

    def _steps(self) -> Iterator[Callable[[], object]]:
        if not self.load.cache:
            for past in range(self.load.prompt, self.load.context):
                yield partial(self._reread, past + 1)
            return
        runner, slots = self._at_prompt()
        rows = self.ids[:, self.load.prompt, None].tolist()

        def step() -> None:
            nonlocal rows
            rows = self.choose(runner.feed(slots, rows))

        for _ in range(self.load.new):
            yield step

    def _open(self) -> tuple[Runner, list[Slot]]:
        load = self.load
        runner = Runner(self.model, Size(load.batch, load.context, min(CHUNK, load.context)))
        return runner, [runner.open(load.context) for _ in range(load.batch)]

    def _at_prompt(self) -> tuple[Runner, list[Slot]]:
        """The cache with the prompt in it: taken back to there where it can be, filled again where it cannot."""
        prompt = self.load.prompt
        if self.opened is None or any(self.opened[0].cache.reach(slot, prompt) != prompt for slot in self.opened[1]):
            self.opened = None
            self.opened = self._open()
            self.opened[0].feed(self.opened[1], self.ids[:, :prompt].tolist())
        for slot in self.opened[1]:
            self.opened[0].cache.rewind(slot, prompt)
        return self.opened

    def _reread(self, length: int) -> list[list[int]]:
        return self.choose(self._again(self.ids[:, :length]))

    @torch.inference_mode()
    def _again(self, ids: Tensor) -> Tensor:
        """Logits after the last token of each row, from nothing."""
        rows, length = ids.shape
        last = torch.arange(1, rows + 1, device=self.device) * length - 1
        logits = self.model(rows_step(ids.to(self.device), horizon=self.load.context, emit=last)).logits
        assert logits is not None
        return logits


@dataclass(frozen=True)
class Roofline:
    """The least time of a decode step and of a prefill: bytes over the memory rate or FLOPs over the matmul rate,
    whichever is more. Both rates were measured in this process."""

    weight_bytes_read: int
    state_bytes_read: int
    memory_byte_s: float
    matmul_flop_s: float
    decode_s: float
    prefill_s: float

    def as_json(self) -> dict[str, Any]:
        return {
            "weight_bytes_read": self.weight_bytes_read,
            "state_bytes_read": self.state_bytes_read,
            "memory_gb_s": self.memory_byte_s / 1e9,
            "matmul_gflop_s": self.matmul_flop_s / 1e9,
            "decode_s": self.decode_s,
            "prefill_s": self.prefill_s,
        }


def roofline(model: LM, load: Load) -> Roofline:
    """Of a load: a decode step reads the weights once and the state of every sequence; without a cache it is a prefill
    of the whole context."""
    weight = next(model.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    read = weights_read(model.spec, load.batch, {name: held_bytes(p) for name, p in model.named_parameters()})
    kept = predict(state_table(model.spec), Size(load.batch, load.context), name).stored if load.cache else 0
    rate, flop_s = memory_byte_s(read + kept, weight.device), matmul_flop_s(weight.dtype, weight.device)
    whole = bill(model.spec, Question(load.context, load.batch)).flops
    first = bill(model.spec, Question(load.reading, load.batch)).flops["prefill"]
    flops = load.batch * whole["decode_per_token"] if load.cache else whole["prefill"]
    decode = max((read + kept) / rate, flops / flop_s)
    return Roofline(read, kept, rate, flop_s, decode, max(read / rate, first / flop_s))
