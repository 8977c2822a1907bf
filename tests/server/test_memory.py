"""Memory that is free and still the process's: how much of it goes back."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest

from assay.engine.server.memory import Tidy
from assay.measure.load import PAGE_BYTES
from tests.server.live import Live, until

LIBC = ctypes.CDLL(None)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="the C library is not glibc")
def test_holes_between_blocks_that_stay_are_given_back() -> None:
    LIBC.malloc.restype, LIBC.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    size, count = 64 << 10, 1000  # below what glibc maps by itself
    blocks = [LIBC.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for number, block in enumerate(blocks):
        if number % 10:
            LIBC.free(block)
    held = resident()
    Tidy().rested()
    assert held - resident() > 0.8 * size * count
    for block in blocks[::10]:
        LIBC.free(block)


def test_seldom_at_work_and_once_at_rest() -> None:
    calls: list[int] = []
    tidy = Tidy(0.1, 0.01, lambda: calls.append(1))
    end = time.monotonic() + 0.35
    while time.monotonic() < end:
        tidy.worked()
    assert 2 <= len(calls) <= 3 and tidy.patience == 0.01
    tidy.rested()
    assert 3 <= len(calls) <= 4 and tidy.patience is None
    tidy.worked()
    assert tidy.patience == 0.01


def test_a_server_gives_back_when_it_has_come_to_rest(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the next request comes, and not again and again."""
    calls: list[bool] = []
    tidy = Tidy(60.0, 0.02, lambda: calls.append(live.server.worker.under_way == 0))
    monkeypatch.setattr(live.server.worker, "tidy", tidy)
    live.ok("/v1/completions", {"prompt": "a", "max_tokens": 2})
    until(lambda: bool(calls))
    time.sleep(0.1)
    assert calls == [True]
