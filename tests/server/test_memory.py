"""Memory that is free and still the process's: how much of it goes back."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest

from assay.engine.server.memory import Tidy
from assay.measure.load import PAGE_BYTES

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
    Tidy(every=0.0)()
    assert held - resident() > 0.8 * size * count
    for block in blocks[::10]:
        LIBC.free(block)


def test_not_more_often_than_it_is_told() -> None:
    calls: list[int] = []
    tidy = Tidy(0.1, lambda: calls.append(1))
    until = time.monotonic() + 0.35
    while time.monotonic() < until:
        tidy()
    assert 2 <= len(calls) <= 3
