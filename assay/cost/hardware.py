"""Rooflines: the least time that a machine's published or measured rates allow, and whether the model fits in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from assay.cost.bill import Bill, Question, Sheet
from assay.model.lm import weight_table
from assay.spec.base import Spec
from assay.spec.load import find, read_mapping, validate
from assay.spec.model import ModelSpec

MOST = 1 << 30
Rate = Annotated[float, Field(gt=0)]


class Hardware(Spec):
    """A device: its memory, the bytes a second it reads from there, and its dense FLOPs a second by dtype."""

    name: str = Field(min_length=1)
    memory_bytes: float = Field(gt=0)
    memory_byte_s: float = Field(gt=0)
    flop_s: Mapping[Literal["bf16", "f16", "f32"], Rate] = Field(min_length=1)

    def rate(self, dtype: str) -> float:
        found = {str(key): value for key, value in self.flop_s.items()}
        if dtype not in found:
            raise ValueError(f"{self.name}: flop_s: has no {dtype}; accepted: {', '.join(found)}")
        return found[dtype]


def load_hardware(source: str | Path) -> Hardware:
    """A shipped name or a YAML file."""
    return validate(Hardware, read_mapping(find(source, "hardware")), str(source))


@dataclass(frozen=True)
class Roofline:
    """On one device, at its full rates: an upper bound that kernels come near and do not reach.

    needed_bytes: weights and reserved state, without working memory. devices: how many of these hold it. prefill_s: of
    the whole batch. decode_s: one token for each sequence, at the full context. bound: what decode waits for.
    longest: the longest context that fits at this batch (0: not even one token; null: no end was found).
    """

    hardware: str
    needed_bytes: int
    memory_bytes: int
    fits: bool
    devices: int
    longest: int | None
    prefill_s: float
    decode_s: float
    decode_tok_s: float
    train_tok_s: float
    bound: Literal["memory", "arithmetic"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def roofline(sheet: Sheet, told: Bill, machine: Hardware) -> Roofline:
    """Every weight that is used is read once a step, and the state of every sequence; arithmetic goes on meanwhile."""
    ask = Question(**told.question)
    flop_s, sizes = machine.rate(ask.floats.dtype), sheet.held(ask)
    weights = weights_read(sheet.spec, ask.batch, sizes)
    reading = (weights + told.state_bytes_read) / machine.memory_byte_s
    working = ask.batch * told.flops["decode_per_token"] / flop_s
    needed = told.weight_bytes + told.reserved_bytes
    step = max(reading, working) if sheet.keeps else math.inf
    every = weights_read(sheet.spec, ask.batch * ask.context, sizes)
    return Roofline(
        machine.name,
        needed,
        int(machine.memory_bytes),
        needed <= machine.memory_bytes,
        -(-needed // int(machine.memory_bytes)),
        longest(sheet, ask, machine.memory_bytes - told.weight_bytes),
        max(every / machine.memory_byte_s, told.flops["prefill"] / flop_s),
        step,
        ask.batch / step,
        flop_s / told.flops["train_per_token"],
        "memory" if reading >= working else "arithmetic",
    )


def decode_seconds(sheet: Sheet, ask: Question, machine: Hardware) -> float:
    """The least time of one decode step of the batch, as in `roofline`; infinite where nothing continues a text."""
    if not sheet.keeps:
        return math.inf
    read = weights_read(sheet.spec, ask.batch, sheet.held(ask)) + sheet.state_bytes_read(ask)
    return max(read / machine.memory_byte_s, ask.batch * sheet.decode_flops(ask) / machine.rate(ask.floats.dtype))


def longest(sheet: Sheet, ask: Question, room: float) -> int | None:
    """The longest context whose reserved state fits into `room` bytes; null where 2^30 tokens still do."""
    limit = min(sheet.limit or MOST, MOST)
    fits: Callable[[int], bool] = lambda n: sheet.reserved_bytes(replace(ask, context=n)) <= room  # noqa: E731
    if not fits(1):
        return 0
    if fits(limit):
        return None if limit == MOST else limit
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def weights_read(spec: ModelSpec, batch: int, sizes: Mapping[str, int] | None = None) -> int:
    """Parameters that a step of the decoder over `batch` tokens must read, or their bytes where their sizes are given:
    of an expert at most `batch` times a token's share; of a lookup table only rows, unless a tied head multiplies with
    it."""
    table = weight_table(spec)
    tied = not any(w.role == "head" for w in table.values())
    total = 0.0
    for name, weight in table.items():
        read = weight.role != "embed" or (name == "embed.weight" and tied)
        if read and not name.startswith("encoder."):
            total += (weight.numel if sizes is None else sizes[name]) * min(1.0, batch * weight.active)
    return round(total)
