"""Tiers one below the other: order, promotion, and writing behind the caller's back."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from assay.cache.tiers import MemoryTier, Tiers
from assay.cache.tiers.record import Tensors, pack
from tests.cache.tiers import SHAPES, name, record, same

SIZE = len(pack(name(0), record(0)))


class Slow(MemoryTier):
    """Writes when it is told to."""

    def __init__(self) -> None:
        super().__init__(100 * SIZE)
        self.go, self.began = threading.Event(), threading.Event()

    def put(self, name: str, tensors: Tensors) -> None:
        self.began.set()
        self.go.wait(10)
        super().put(name, tensors)


class Broken(MemoryTier):
    def put(self, name: str, tensors: Tensors) -> None:
        raise RuntimeError("no")


def test_put_reaches_all_and_a_hit_moves_up() -> None:
    near, far = MemoryTier(2 * SIZE), MemoryTier(9 * SIZE)
    tiers = Tiers([near, far])
    for number in (1, 2, 3):
        assert tiers.put(name(number), record(number))
    tiers.flush()
    assert near.held() == 2 * SIZE and far.held() == 3 * SIZE and not near._has(name(1))
    assert same(tiers.get(name(1), SHAPES), 1)
    tiers.flush()
    assert near._has(name(1)) and not near._has(name(2)), "promoted, in the place of the oldest"
    assert same(tiers.get(name(1), SHAPES), 1) and tiers.get(name(4), SHAPES) is None
    assert (near.stats()["hits"], near.stats()["misses"], far.stats()["hits"]) == (1, 2, 1)
    assert far.stats()["puts"] == 3, "nothing is written down again"
    tiers.close()


def test_writing_is_behind_and_bounded() -> None:
    """Nobody waits for a slow tier: what waits can be read, two wait at most beside the one at work, the next is
    dropped and counted."""
    slow = Slow()
    tiers = Tiers([slow], behind=2)
    first = record(1)
    began = time.perf_counter()
    assert tiers.put(name(1), first)
    first["k"].zero_()
    slow.began.wait(10)
    assert [tiers.put(name(n), record(n)) for n in (2, 3, 4)] == [True, True, False]
    assert time.perf_counter() - began < 5
    assert same(tiers.get(name(1), SHAPES), 1), "a copy, and at hand while it waits"
    assert tiers.report()["behind"] == {"waiting": 3, "dropped": 1, "failed": 0}
    slow.go.set()
    tiers.close()
    assert slow.stats()["puts"] == 3 and same(slow.get(name(1), SHAPES), 1)


def test_a_tier_that_breaks_stops_nobody() -> None:
    far = MemoryTier(9 * SIZE)
    tiers = Tiers([far, Broken(SIZE)])
    for number in range(3):
        tiers.put(name(number), record(number))
    tiers.flush()
    assert far.stats()["puts"] == 3 and tiers.report()["behind"]["failed"] == 3
    tiers.put(name(7), record(7) | {"k": torch.zeros(1)})
    tiers.close()
    assert far.stats()["puts"] == 4


def test_from_many_threads() -> None:
    tiers = Tiers([MemoryTier(40 * SIZE), MemoryTier(400 * SIZE)], behind=500)
    wrong: list[int] = []

    def work(part: int) -> None:
        for number in range(part * 20, part * 20 + 20):
            tiers.put(name(number), record(number))
            if not same(tiers.get(name(number), SHAPES), number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tiers.close()
    assert not wrong and tiers.levels[1].stats()["puts"] == 80


def test_no_tiers_are_refused() -> None:
    with pytest.raises(ValueError, match="0 tiers, behind=64"):
        Tiers([])
