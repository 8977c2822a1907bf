"""Requests that come together begin together: who waits for whom, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from assay.engine.policy import Plan
from assay.engine.scheduler import Scheduler
from assay.engine.server import worker
from assay.engine.server.errors import ApiError
from assay.engine.server.prompts import Desk
from tests.server.live import Live, events, until

SLOW = "whoever reads this takes its time"
ASK = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}


class Held:
    """Reading a prompt that is `SLOW` waits until `go`; with `refused` it is then refused."""

    def __init__(self, live: Live) -> None:
        self.live, self.go, self.refused, self.plans = live, threading.Event(), False, list[Plan]()
        self.pool = ThreadPoolExecutor(4)

    def reading(self) -> Future[httpx.Response]:
        """A call that is being read."""
        asked = self.pool.submit(self.live.post, "/v1/completions", {**ASK, "prompt": SLOW})
        until(lambda: bool(self.live.server.worker.coming))
        return asked

    def ask(self) -> Future[httpx.Response]:
        """A call that nothing holds up."""
        return self.pool.submit(self.live.post, "/v1/completions", {**ASK, "prompt": "hello"}, timeout=10)

    @property
    def together(self) -> list[int]:
        """Prompts in each step that had some."""
        return [len(plan.chunks) for plan in self.plans if plan.chunks]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    with Live() as live:
        made = Held(live)
        read, plan = Desk.completions, Scheduler.plan

        def slowly(desk: Desk, body: Any, tenant: str) -> Any:
            if body.prompt == SLOW:
                assert made.go.wait(30)
                if made.refused:
                    raise ApiError(400, "prompt: not this one", "prompt")
            return read(desk, body, tenant)

        def noted(scheduler: Scheduler, now: float) -> Plan:
            made.plans.append(plan(scheduler, now))
            return made.plans[-1]

        monkeypatch.setattr(Desk, "completions", slowly)
        monkeypatch.setattr(Scheduler, "plan", noted)
        monkeypatch.setattr(worker, "GATHER_S", 20.0)
        yield made
        made.go.set()
        made.pool.shutdown()


def test_an_idle_engine_waits_for_a_request_that_is_being_read(held: Held) -> None:
    slow, quick = held.reading(), held.ask()
    until(lambda: held.live.server.worker.under_way == 1)
    held.go.set()
    assert (slow.result().status_code, quick.result().status_code) == (200, 200)
    assert held.together == [2]


def test_it_does_not_wait_for_ever(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GATHER_S", 0.05)
    slow, quick = held.reading(), held.ask()
    assert quick.result().status_code == 200 and held.together == [1]
    held.go.set()
    assert slow.result().status_code == 200


def test_it_does_not_wait_for_one_that_is_refused(held: Held) -> None:
    held.refused = True
    slow, quick = held.reading(), held.ask()
    until(lambda: held.live.server.worker.under_way == 1)
    held.go.set()
    assert (slow.result().status_code, quick.result().status_code) == (400, 200)
    assert held.together == [1] and not held.live.server.worker.coming


def test_nobody_waits_while_replies_run(held: Held) -> None:
    long = {**ASK, "prompt": "go on", "max_tokens": 1500, "stream": True}
    with held.live.client.stream("POST", "/v1/completions", json=long) as answer:
        lines = events(answer.iter_lines())
        next(lines)
        slow, quick = held.reading(), held.ask()
        assert quick.result().status_code == 200
        assert held.live.server.worker.under_way == 1, "the long reply has ended; it should have run all the while"
    held.go.set()
    assert slow.result().status_code == 200
