"""The simulator against a real engine: its log of steps and requests, replayed. No torch.

The log is JSON lines of two kinds. A step: prefill_tokens, decodes, context (tokens stored before it, of all its
sequences), seconds, and `pairs` where it is known. A request: arrival [s], prompt, new, ttft [s], done [s, when the
last token was there, on the clock of arrival].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from assay.simulate.cost import Fit, Machine, StepCost, Work, works_of
from assay.simulate.fleet import Fleet
from assay.simulate.run import simulate
from assay.simulate.trace import Arrival, json_lines, number, whole

STEP, REQUEST = ("prefill_tokens", "decodes", "context", "seconds"), ("arrival", "prompt", "new", "ttft", "done")


@dataclass(frozen=True)
class Log:
    """Steps as rows for `StepCost.fit`; requests by arrival, the first at 0, with their ttft and latency [s]."""

    steps: tuple[dict[str, Any], ...]
    requests: tuple[Arrival, ...]
    ttft: tuple[float, ...]
    latency: tuple[float, ...]


def read_log(path: Path) -> Log:
    steps, requests = [], []
    for where, row in json_lines(path):
        if "prefill_tokens" in row:
            steps.append(_step(row, where))
        elif "arrival" in row:
            requests.append(_request(row, where))
        else:
            raise ValueError(f"{where}: accepted: a step ({', '.join(STEP)}) or a request ({', '.join(REQUEST)})")
    if not steps or not requests:
        raise ValueError(f"{path}: {len(steps)} steps and {len(requests)} requests; accepted: some of each")
    requests.sort(key=lambda one: one[0].at)
    start = requests[0][0].at
    asked = tuple(Arrival(one.at - start, one.prompt, one.new) for one, _, _ in requests)
    return Log(tuple(steps), asked, tuple(ttft for _, ttft, _ in requests), tuple(took for _, _, took in requests))


def _step(row: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: whole(row, name, where, 0) for name in STEP[:3]}
    if not found["prefill_tokens"] and not found["decodes"]:
        raise ValueError(f"{where}: prefill_tokens 0, decodes 0; accepted: a step has tokens")
    extra = {"pairs": number(row, "pairs", where)} if "pairs" in row else {}
    return {**found, "seconds": number(row, "seconds", where), **extra}


def _request(row: dict[str, Any], where: str) -> tuple[Arrival, float, float]:
    at, ttft, done = (number(row, name, where) for name in ("arrival", "ttft", "done"))
    if done < at + ttft - 1e-6:
        raise ValueError(f"{where}: done: {done!r}; accepted: at least arrival + ttft, {at + ttft!r}")
    return Arrival(at, whole(row, "prompt", where), whole(row, "new", where)), ttft, done - at


def check(log: Log, fleet: Fleet, machine: Machine | None = None) -> dict[str, Any]:
    """steps: how well the costs say the time of the log's steps (fitted to all of them where no machine is given: then
    requests are the test, since no queue was fitted). ttft, latency: measured and simulated mean, p50 and p99, and
    their errors, simulated / measured - 1; request_error: the mean of |error| over requests. work: tokens of prompts,
    decodes and steps of the log and of the simulation: where they differ, so did the scheduling."""
    logged = works_of(log.steps)
    seconds = np.asarray([row["seconds"] for row in log.steps])
    found = StepCost.fit(log.steps) if machine is None else Fit.of(machine.step, logged, seconds)
    run = simulate(log.requests, machine or Machine(name="fitted", step=found.cost), fleet)
    if lost := sum(one.refused for one in run.served):
        raise ValueError(f"{lost} requests of the log have no room on a replica; accepted: a larger capacity")
    simulated = [replica.total for replica in run.replicas]
    return {
        "fitted": machine is None,
        "steps": found.as_json(),
        "ttft": compare(log.ttft, [one.ttft for one in run.served]),
        "latency": compare(log.latency, [one.latency for one in run.served]),
        "work": {
            "logged": _work(logged, len(logged)),
            "simulated": _work(simulated, sum(replica.steps for replica in run.replicas)),
        },
    }


def compare(measured: Sequence[float], simulated: Sequence[float]) -> dict[str, Any]:
    real, made = np.asarray(measured), np.asarray(simulated)
    points = {"mean": (real.mean(), made.mean())}
    points |= {f"p{p}": (np.percentile(real, p), np.percentile(made, p)) for p in (50, 99)}
    rows: dict[str, Any] = {
        name: {"measured": float(a), "simulated": float(b), "error": float(b / a - 1)}
        for name, (a, b) in points.items()
    }
    return {**rows, "request_error": float(np.mean(np.abs(made / real - 1)))}


def _work(works: Sequence[Work], steps: int) -> dict[str, int]:
    return {
        "prefill": sum(work.prefill for work in works),
        "decodes": sum(work.decodes for work in works),
        "steps": steps,
    }
