"""Records in this process's own memory."""

from __future__ import annotations

import threading
from collections import OrderedDict

from assay.cache.tiers.tier import Tier


class MemoryTier(Tier):
    """Bytes on the host: where pages stay that an accelerator has no room for."""

    def __init__(self, bound: int) -> None:
        super().__init__(bound)
        self._records: OrderedDict[str, bytes] = OrderedDict()
        self._total, self._alone = 0, threading.Lock()

    def _read(self, name: str) -> bytes | None:
        with self._alone:
            if name in self._records:
                self._records.move_to_end(name)
            return self._records.get(name)

    def _write(self, name: str, blob: bytes) -> int:
        evicted = 0
        with self._alone:
            self._total += len(blob) - len(self._records.pop(name, b""))
            while self._total > self.bound:
                self._total -= len(self._records.popitem(last=False)[1])
                evicted += 1
            self._records[name] = blob
        return evicted

    def _drop(self, name: str) -> None:
        with self._alone:
            self._total -= len(self._records.pop(name, b""))

    def _has(self, name: str) -> bool:
        with self._alone:
            return name in self._records

    def held(self) -> int:
        with self._alone:
            return self._total
