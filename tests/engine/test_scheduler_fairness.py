"""Fairness between tenants: the bounds that Sheng et al. 2024 (arXiv 2401.00588) prove for the virtual token counter.

Service is counted here from what jobs were let in and said, not read from the scheduler.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.engine.queues import Queue
from assay.engine.scheduler import Job, SchedulerConfig
from tests.engine.serving import Client, Pages, Server

PAGES, PROMPT = 40, 12  # tokens of memory; the longest prompt


def bound(weight: float) -> float:
    """2U of theorem 4.4: by how much the service of two tenants may differ while both of them have jobs waiting."""
    return 2 * max(float(PROMPT), weight * PAGES)


def server(clients: Sequence[Client], **config: Any) -> Server:
    given = {"budget": 16, "max_running": 16, "capacity": PAGES, "watermark": 0, "fairness": "vtc", **config}
    return Server(Pages(PAGES, 1, rows=16), SchedulerConfig(**given), clients)


def unequal(seed: int, each: int, late: float = 0.0) -> list[Client]:
    """Tenant a has short prompts and long replies, b the opposite and a higher priority, c comes `late`."""
    rng, clients = random.Random(seed), []
    for tenant, prompt, new, priority, arrival in (
        ("a", 3, 20, 0, 0.0),
        ("b", PROMPT, 3, -5, 0.0),
        ("c", 5, 5, 0, late),
    ):
        for _ in range(each):
            asked, says = rng.randint(1, prompt), rng.randint(1, new)
            clients.append(Client(Job(len(clients), asked, new, arrival, priority, tenant), says))
    return clients


def gaps(run: Server, pair: tuple[str, str]) -> float:
    """The most by which the service of two tenants differs over any interval in which jobs of both wait.

    Theorem 4.4 speaks of every interval: of the spread of the difference, not of its size.
    """
    spread: list[float] = []
    worst = 0.0
    for _ in run.run():
        if all(any(run.by_id[id].job.tenant == name for id in run.waiting) for name in pair):
            spread.append(run.service.get(pair[0], 0.0) - run.service.get(pair[1], 0.0))
            worst = max(worst, max(spread) - min(spread))
        else:
            spread = []
    return worst


@settings(max_examples=12)
@given(
    st.integers(0, 1 << 32),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from(["chunked", "prefill_first"]),
    st.sampled_from(["none", "full"]),
    st.sampled_from(["recompute", "swap"]),
)
def test_tenants_that_wait_are_served_alike(seed: int, weight: float, policy: str, reserve: str, preempt: str) -> None:
    for pair in (("a", "b"), ("a", "c"), ("b", "c")):
        run = server(unequal(seed, 25), policy=policy, reserve=reserve, preempt=preempt, reply_weight=weight)
        assert 0 < gaps(run, pair) <= bound(weight)


def test_without_it_they_are_not() -> None:
    assert gaps(server(unequal(0, 25), fairness="none"), ("a", "b")) > bound(2.0)


@pytest.mark.parametrize("seed", range(3))
def test_who_asked_for_nothing_has_no_credit(seed: int) -> None:
    """c comes when a has had service far beyond the bound, and is not served alone until it has caught up."""
    run = server(unequal(seed, 40, late=120.0))
    assert gaps(run, ("a", "c")) <= bound(2.0)


def test_a_tenant_that_comes_back_to_an_empty_queue_starts_where_the_last_one_left() -> None:
    queue = Queue()
    for tenant, served in (("old", 5.0), ("busy", 90.0)):
        queue.push(tenant, (0.0, 0.0, 1))
        queue.charge(tenant, served)
        queue.remove(tenant, (0.0, 0.0, 1))
    queue.push("old", (0.0, 0.0, 2))  # lifted from 5 to 90
    queue.push("busy", (-1.0, 0.0, 3))  # 90: as much, and ranks before
    queue.push("new", (-2.0, 0.0, 4))  # lifted from 0 to 90
    order = []
    while (id := queue.first()) is not None:
        order.append(id)
        tenant, rank = {2: ("old", 0.0), 3: ("busy", -1.0), 4: ("new", -2.0)}[id]
        queue.remove(tenant, (rank, 0.0, id))
    assert order == [4, 3, 2] and len(queue) == 0


def test_a_new_tenant_starts_with_the_one_that_has_waited_most() -> None:
    queue = Queue()
    for id, served in enumerate((10.0, 100.0)):
        queue.push(str(id), (0.0, 0.0, id))
        queue.charge(str(id), served)
    queue.push("new", (-1.0, 0.0, 2))  # lifted to 10, not to 100: level with the first, and ranks before
    assert queue.first() == 2
    queue.charge("new", 1.0)
    assert queue.first() == 0


def test_priority_orders_a_tenants_own_jobs_alone() -> None:
    """One place, equal jobs: tenants take turns whatever priority they claim, each with its most urgent job first."""
    jobs = [
        Job(0, 2, 1, 0.0, 5, "a"),
        Job(1, 2, 1, 0.0, 3, "a"),
        Job(2, 2, 1, 0.0, -9, "b"),
        Job(3, 2, 1, 0.0, -8, "b"),
    ]
    run = server([Client(job, 1) for job in jobs], max_running=1)
    assert [id for plan in run.run() for id, _ in plan.chunks] == [2, 1, 3, 0]


def test_stored_beginnings_cost_a_tenant_nothing() -> None:
    """a's prompts of 10 are stored but for 1 token: it gets 12 / (1 + 2) jobs done for each of b's."""
    jobs = [Client(Job(id, 10, 1, 0.0, 0, "ab"[id % 2]), 1, cached=9 * (id % 2 == 0)) for id in range(40)]
    order = [id for plan in server(jobs, max_running=1).run() for id, _ in plan.chunks]
    assert [id % 2 for id in order[:25]].count(0) == 20
