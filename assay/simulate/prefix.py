"""A cache of beginnings of prompts, in blocks, and what share of a trace it would answer. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Literal

from assay.simulate.trace import BLOCK, Trace

Evict = Literal["lru", "lfu"]
EVICT: tuple[Evict, ...] = ("lru", "lfu")


class PrefixCache:
    """Blocks by number; a number stands for all that came before it too. capacity: blocks; null is without end.

    What is dropped: the block used least recently, or (lfu) least often and of those least recently. A prompt's first
    block counts as used after its last one, so that a chain loses its end before its beginning.
    """

    def __init__(self, capacity: int | None, evict: Evict = "lru") -> None:
        if capacity is not None and capacity < 0:
            raise ValueError(f"cache blocks: {capacity}; accepted: 0 or more")
        if evict not in EVICT:
            raise ValueError(f"evict: {evict!r}; accepted: {', '.join(EVICT)}")
        self.capacity, self.evict = capacity, evict
        self.clock = 0
        self.ranks: dict[int, tuple[int, int]] = {}
        self.queue: list[tuple[tuple[int, int], int]] = []  # ranks as they were: an entry that changed is skipped

    def match(self, blocks: Sequence[int]) -> int:
        """Blocks of the beginning that are here."""
        return next((i for i, block in enumerate(blocks) if block not in self.ranks), len(blocks))

    def use(self, blocks: Sequence[int]) -> None:
        """Keep these and count one use of each."""
        if self.capacity == 0:
            return
        for block in reversed(blocks):
            if block not in self.ranks and len(self.ranks) == self.capacity:
                self._drop()
            self.clock += 1
            uses = self.ranks.get(block, (0, 0))[0] + 1 if self.evict == "lfu" else 0
            self.ranks[block] = (uses, self.clock)
            if self.capacity is not None:
                heapq.heappush(self.queue, (self.ranks[block], block))

    def _drop(self) -> None:
        while True:
            rank, block = heapq.heappop(self.queue)
            if self.ranks.get(block) == rank:
                del self.ranks[block]
                return


def known_tokens(found: int, prompt: int) -> int:
    """Tokens that need not be read again: the last one always is, for its logits."""
    return min(found * BLOCK, prompt - 1)


def hit_rate(trace: Trace, capacity: int | None, evict: Evict = "lru") -> float:
    """Share of the trace's blocks found at the beginning of a prompt, requests one after the other."""
    cache, hits, asked = PrefixCache(capacity, evict), 0, 0
    for one in trace:
        hits, asked = hits + cache.match(one.blocks), asked + len(one.blocks)
        cache.use(one.blocks)
    return hits / asked if asked else 0.0


def hit_rates(trace: Trace, capacities: Iterable[int | None], evict: Evict) -> list[tuple[int | None, float]]:
    return [(capacity, hit_rate(trace, capacity, evict)) for capacity in capacities]
