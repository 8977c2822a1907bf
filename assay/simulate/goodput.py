"""What a run was like, and the rate up to which it is good enough. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay.simulate.cost import Machine
from assay.simulate.fleet import Fleet
from assay.simulate.run import Run, Served, simulate
from assay.simulate.trace import Trace, at_rate, rate_of

TOLERANCE, MOST = 0.02, 1 << 20


@dataclass(frozen=True)
class Slo:
    """Limits [s]: to the first token, of the longest time between two tokens, of the mean time of one; and the share of
    requests that has to keep all of them (Zhong et al. 2024, arXiv 2401.09670: goodput, at 90 %)."""

    ttft: float | None = None
    tbt: float | None = None
    tpot: float | None = None
    share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("ttft", "tbt", "tpot"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"slo {name}: {value}; accepted: seconds above 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"slo share: {self.share}; accepted: above 0, at most 1")

    @property
    def limits(self) -> bool:
        return any(limit is not None for limit in (self.ttft, self.tbt, self.tpot))

    def kept(self, one: Served) -> bool:
        if not one.done:
            return False
        return (
            (self.ttft is None or one.ttft <= self.ttft)
            and (self.tpot is None or one.tpot <= self.tpot)
            and (self.tbt is None or max(one.gaps, default=0.0) <= self.tbt)
        )


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Seconds; null without values."""
    if not values:
        return None
    mean, (p50, p90, p99) = float(np.mean(values)), np.percentile(values, (50, 90, 99))
    return {"mean": mean, "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(max(values))}


def summary(run: Run, slo: Slo) -> dict[str, Any]:
    """Times in seconds. busy: the share of the replicas' time in which they worked. inside: requests in the system on
    average. attained: the share of all requests that kept the limits, null without limits."""
    done = [one for one in run.served if one.done]
    asked = sum(replica.asked for replica in run.replicas)
    return {
        "machines": len(run.replicas),
        "requests": len(run.served),
        "refused": sum(one.refused for one in run.served),
        "rate": rate_of([one.arrival for one in run.served]),
        "seconds": run.end,
        "throughput_req_s": len(done) / run.end if run.end else 0.0,
        "throughput_tok_s": sum(one.arrival.new for one in done) / run.end if run.end else 0.0,
        "ttft_s": spread([one.ttft for one in done]),
        "tbt_s": spread([gap for one in done for gap in one.gaps]),
        "tpot_s": spread([one.tpot for one in done if one.arrival.new > 1]),
        "latency_s": spread([one.latency for one in done]),
        "attained": sum(map(slo.kept, run.served)) / len(run.served) if slo.limits else None,
        "busy": sum(replica.busy for replica in run.replicas) / run.end / len(run.replicas) if run.end else 0.0,
        "inside": run.inside,
        "hit_rate": sum(replica.hits for replica in run.replicas) / asked if asked else None,
        "preempted": sum(replica.preempted for replica in run.replicas),
        "steps": sum(replica.steps for replica in run.replicas),
    }


def attains(trace: Trace, machine: Machine, fleet: Fleet, slo: Slo) -> bool:
    """Whether enough requests keep the limits; the simulation ends as soon as too many have not."""
    allowed, missed = len(trace) * (1 - slo.share) + 1e-9, 0

    def watch(one: Served) -> bool:
        nonlocal missed
        missed += not slo.kept(one)
        return missed > allowed

    run = simulate(trace, machine, fleet, watch)
    return missed + sum(one.refused for one in run.served) <= allowed


def goodput(trace: Trace, machine: Machine, fleet: Fleet, slo: Slo, tick: Callable[[], None] = lambda: None) -> float:
    """The largest rate [requests / s] at which the limits are kept, by doubling and bisection to 2 %; 0 where they are
    not even at the lowest rate that is tried, a 64th of what one replica can read; infinite where they are kept when
    all requests come at once, so that the trace is too short to tell.

    One trace at every rate, so the answer is for as many requests as it has: a queue that grows slowly may not show in
    few. Attainment is taken to fall with the rate; where it does not, this is a crossing, not the highest.
    """
    if not slo.limits:
        raise ValueError("goodput: no limit; accepted: one of slo-ttft, slo-tbt and slo-tpot, or more")

    def good(asked: Trace) -> bool:
        tick()
        return attains(asked, machine, fleet, slo)

    if good([replace(one, at=0.0) for one in trace]):
        return float("inf")
    low, high = 0.0, start_rate(trace, machine)
    while good(at_rate(trace, high)):
        low, high = high, 2 * high
        if high > MOST:
            return float("inf")
    if low == 0.0 and not good(at_rate(trace, low := high / 64)):
        return 0.0
    while high / low > 1 + TOLERANCE:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(at_rate(trace, middle)) else (low, middle)
    return low


def start_rate(trace: Trace, machine: Machine) -> float:
    """One replica that reads prompts alone, without end."""
    return 1 / max(float(np.mean([machine.step.prompt(one.prompt) for one in trace])), 1e-6)
