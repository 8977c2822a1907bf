"""Timings run without a neighbour."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from assay.measure.topics import alone, topics
from assay.study.runners.alone import Room

SPAWN = mp.get_context("spawn")


def walks(folder: Path, said: Any, until: float) -> None:
    """Work in steps of a few milliseconds, telling when each begins and ends."""
    with Room(folder) as room:
        said.put(("in", time.monotonic(), 0.0))
        while time.monotonic() < until:
            room.pass_by()
            start = time.monotonic()
            time.sleep(0.005)
            said.put(("step", start, time.monotonic()))


def times(folder: Path, said: Any, count: int) -> None:
    with Room(folder) as room:
        said.put(("in", time.monotonic(), 0.0))
        for _ in range(count):
            room.pass_by()
            with room.alone():
                start = time.monotonic()
                time.sleep(0.03)
                said.put(("alone", start, time.monotonic()))


def heard(said: Any) -> list[tuple[str, float, float]]:
    found = []
    while not said.empty():
        found.append(said.get(timeout=5))
    return found


def test_nobody_works_while_one_is_alone(tmp_path: Path) -> None:
    said = SPAWN.Queue()
    until = time.monotonic() + 4.0
    jobs = [SPAWN.Process(target=walks, args=(tmp_path, said, until)) for _ in range(2)]
    jobs += [SPAWN.Process(target=times, args=(tmp_path, said, 5)) for _ in range(2)]
    for job in jobs:
        job.start()
    found: list[tuple[str, float, float]] = []
    while any(job.is_alive() for job in jobs):
        found += heard(said)
        time.sleep(0.01)
    found += heard(said)
    assert [job.exitcode for job in jobs] == [0] * 4
    mine = [(a, b) for kind, a, b in found if kind == "alone"]
    others = [(a, b) for kind, a, b in found if kind == "step"] + mine
    assert len(mine) == 10 and len(others) > 100
    for a, b in mine:
        assert [(c, d) for c, d in others if c < b and a < d] == [(a, b)]


def test_one_that_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    said = SPAWN.Queue()
    job = SPAWN.Process(target=walks, args=(tmp_path, said, time.monotonic() + 60))
    job.start()
    assert said.get(timeout=30)[0] == "in"
    assert job.pid is not None
    os.kill(job.pid, signal.SIGSTOP)  # inside, and never to pass by again
    with Room(tmp_path) as room:
        os.kill(job.pid, signal.SIGKILL)
        with room.alone():
            pass
    job.join()


@pytest.mark.parametrize(("name", "expected"), [("latency", True), ("kernels", True), ("extrapolation", False)])
def test_which_measurements_time_something(name: str, expected: bool) -> None:
    assert name in topics()
    assert alone(name) is expected
