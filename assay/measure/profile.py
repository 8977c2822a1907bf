"""Which kernel each millisecond of reading a prompt and of decoding went to.

Decoding: what its tape runs, each kernel and operation by the clock. Reading, and what has no tape: torch's profiler,
self times. What is left of the wall's time is Python and everything between the calls.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from assay.measure.serving import Serving
from assay.ops.tape import OWN

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv"})
READ, WARM = 2, 4


@dataclass(frozen=True)
class Spent:
    """Seconds and calls by name, of `wall` seconds in `rounds` steps. Names of our own kernels begin with `assay::`."""

    seconds: Mapping[str, float]
    calls: Mapping[str, int]
    wall: float
    rounds: int

    def rows(self, phase: str, dtype: torch.dtype) -> list[dict[str, Any]]:
        """phase, kernel, where, calls and ms a step, share of the step; the most first, Python's part last."""
        each = [
            {
                "phase": phase,
                "kernel": name,
                "where": where(name, dtype),
                "calls": self.calls[name] / self.rounds,
                "ms": 1e3 * spent / self.rounds,
                "share": spent / self.wall,
            }
            for name, spent in sorted(self.seconds.items(), key=lambda pair: -pair[1])
        ]
        rest = max(0.0, self.wall - sum(self.seconds.values()))
        told = {"kernel": "between the calls", "where": "python", "calls": None, "ms": 1e3 * rest / self.rounds}
        return [*each, {"phase": phase, **told, "share": rest / self.wall}]


def where(name: str, dtype: torch.dtype) -> str:
    """own: compiled from ops/native; oneDNN or BLAS: the library that torch hands products to, by their type; aten."""
    if name.startswith(OWN):
        return "own"
    if "mkldnn" in name:
        return "oneDNN"
    if name.removeprefix("aten::") in PRODUCTS:
        return "oneDNN" if dtype in (torch.bfloat16, torch.float16) else "BLAS"
    return "aten"


def profiled(serving: Serving, steps: int = 16) -> list[dict[str, Any]]:
    """Rows of reading the prompt and then of decoding, as `Spent.rows` has them. For a load with a cache, on a CPU."""
    dtype = next(p.dtype for p in serving.model.parameters() if p.is_floating_point())
    if serving.opened is None:
        serving.prefill()
    for _ in range(WARM):
        next(serving.tokens)()
    decoded = decoding(serving, steps)  # before other prefills: they make the cache anew
    return by_torch(serving.prefill, READ).rows("prefill", dtype) + decoded.rows("decode", dtype)


def decoding(serving: Serving, steps: int) -> Spent:
    """The next steps, from their tapes where they all have one."""
    assert serving.opened is not None
    tapes = serving.opened[0].tapes
    calls = [next(serving.tokens) for _ in range(steps)]
    with tapes.clocked() as took:
        start = time.perf_counter()
        for call in calls:
            call()
        wall = time.perf_counter() - start
    if took.steps < steps // 2:
        return by_torch(lambda: next(serving.tokens)(), steps)
    return Spent(took.seconds, took.calls, wall, steps)


def by_torch(call: Callable[[], object], rounds: int) -> Spent:
    """As torch's profiler sees some calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        wall = time.perf_counter() - start
    seconds, calls = Counter[str](), Counter[str]()
    for event in profile.key_averages():
        if event.key.startswith(("aten::", "mkldnn", OWN)):
            seconds[event.key] += event.self_cpu_time_total / 1e6
            calls[event.key] += event.count
    return Spent(seconds, calls, wall, rounds)


def table(rows: list[dict[str, Any]], least: float = 0.005) -> list[str]:
    """Lines for a terminal: kernels with at least this share, a phase after the other."""
    lines = [f"{'':8}{'kernel':34}{'where':8}{'calls':>9}{'ms':>10}{'share':>8}"]
    for row in rows:
        if row["share"] >= least:
            calls = "" if row["calls"] is None else f"{row['calls']:,.0f}"
            name = str(row["kernel"])[:33]
            lines.append(f"{row['phase']:8}{name:34}{row['where']:8}{calls:>9}{row['ms']:>10.3f}{row['share']:>8.1%}")
    return lines
