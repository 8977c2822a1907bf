"""The event loop against queueing theory: waiting times, Little's law, no idle server while somebody waits."""

from __future__ import annotations

import numpy as np
import pytest

from assay.simulate.cost import StepCost, chunk_pairs
from assay.simulate.generate import generate
from assay.simulate.run import Run, simulate
from assay.simulate.trace import Arrival
from tests.simulate.cases import GPU, fleet, machine, whole

SERVICE = 0.25


def single(load: float, count: int, seed: int) -> tuple[np.ndarray, Run]:
    """Poisson arrivals at one server that takes SERVICE for each, one at a time."""
    times = np.cumsum(np.random.default_rng(seed).exponential(SERVICE / load, count))
    trace = [Arrival(float(t), 1, 1) for t in times]
    return times, simulate(trace, machine(StepCost(overhead=SERVICE)), fleet(running=1))


@pytest.mark.parametrize(("load", "count", "seed"), [(0.5, 10_000, 0), (0.8, 20_000, 0), (0.9, 50_000, 0)])
def test_mean_wait_is_that_of_m_d_1(load: float, count: int, seed: int) -> None:
    """Pollaczek and Khinchine: with a constant service time the mean wait is load / (2 (1 - load)) services."""
    times, run = single(load, count, seed)
    waits = np.asarray([one.ttft for one in run.served]) - SERVICE
    expected = SERVICE * load / (2 * (1 - load))
    assert abs(waits.mean() / expected - 1) < 0.05
    # Lindley's recursion says every single wait of these arrivals.
    free, lindley = 0.0, []
    for time in times:
        start = max(free, time)
        lindley.append(start - time)
        free = start + SERVICE
    np.testing.assert_allclose(waits, lindley, atol=1e-6)


def covered(run: Run) -> float:
    """Time in which at least one request is in the system."""
    total, end = 0.0, -1.0
    for one in sorted(run.served, key=lambda one: one.arrival.at):
        start, stop = one.arrival.at, one.arrival.at + one.latency
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@pytest.mark.parametrize("policy", ["chunked", "prefill_first", "static"])
@pytest.mark.parametrize("running", [1, 4, 64])
def test_a_replica_works_whenever_somebody_is_there(policy: str, running: int) -> None:
    trace = generate("conversation", 60, 2.0, 1)
    run = simulate(trace, machine(), fleet(policy, 512, running))
    assert run.replicas[0].busy == pytest.approx(covered(run), rel=1e-9)
    assert run.replicas[0].total.decodes == sum(one.new - 1 for one in trace)
    assert run.replicas[0].total.prefill == sum(one.prompt for one in trace)


@pytest.mark.parametrize("split", [False, True])
def test_littles_law(split: bool) -> None:
    """Requests in the system = rate of departure * mean time in it (Little 1961), whatever the policy."""
    trace = generate("code", 200, 6.0, 2, cv=2.0)
    parts = {"prefill": 2, "decode": 1} if split else {"replicas": 2}
    run = simulate(trace, machine(state_bytes=131_072), fleet(**parts))
    total = sum(one.latency for one in run.served)
    assert run.inside == pytest.approx(len(trace) / run.end * total / len(trace), rel=1e-9)


@pytest.mark.parametrize("prompt", [1, 300, 512, 1300])
def test_without_load_the_first_token_takes_as_long_as_its_prompt(prompt: int) -> None:
    trace = [Arrival(10.0 * i, prompt, 5) for i in range(3)]
    expected = 0.002 + max(0.009, 3e-5 * prompt) + 1e-9 * prompt * (prompt + 1) / 2
    for one in simulate(trace, machine(), whole()).served:
        assert one.ttft == pytest.approx(expected) == GPU.prompt(prompt)
        steps = [0.011 + 3e-5 * 0 + 8e-8 * (prompt + i) for i in range(4)]
        np.testing.assert_allclose(one.gaps, steps, rtol=1e-6)
    pieces = [(min(512, prompt - past), past) for past in range(0, prompt, 512)]
    in_chunks = sum(
        0.002 + max(0.009, 3e-5 * n) + 8e-8 * past + 1e-9 * chunk_pairs(n, past) for n, past in pieces
    )
    assert simulate(trace, machine(), fleet()).served[0].ttft == pytest.approx(in_chunks)


def test_the_same_seed_is_the_same_run() -> None:
    kinds = [fleet(replicas=3, route=route, cache=500) for route in ("hash", "prefix", "least_loaded")]
    for kind in kinds:
        first, again = (simulate(generate("sessions", 80, 3.0, 5), machine(), kind) for _ in range(2))
        assert [one.times for one in first.served] == [one.times for one in again.served]
        other = simulate(generate("sessions", 80, 3.0, 6), machine(), kind)
        assert [one.times for one in first.served] != [one.times for one in other.served]


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_a_small_memory_delays_and_loses_nothing(preempt: str) -> None:
    trace = generate("conversation", 40, 8.0, 3)
    room = max(one.prompt + one.new for one in trace) + 600
    small = machine(capacity=room, state_bytes=131_072)
    run = simulate(trace, small, fleet(scheduler={"preempt": preempt}))
    roomy = simulate(trace, machine(state_bytes=131_072), fleet())
    assert all(one.done for one in run.served)
    assert run.replicas[0].preempted > 0 == roomy.replicas[0].preempted
    assert run.replicas[0].room.used == 0 and run.end > roomy.end
    extra = run.replicas[0].total.prefill - roomy.replicas[0].total.prefill
    assert extra > 0 if preempt == "recompute" else extra == 0


def test_what_never_fits_is_refused_and_the_rest_is_served() -> None:
    trace = [Arrival(0.0, 100, 10), Arrival(0.0, 5000, 10), Arrival(0.1, 50, 10)]
    run = simulate(trace, machine(capacity=1000), fleet())
    assert [one.refused for one in run.served] == [False, True, False]
    assert [one.done for one in run.served] == [True, False, True]
