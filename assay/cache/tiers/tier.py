"""What every tier does: records by name, checked when they come back, counted, and never more bytes than allowed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor

from assay.cache.tiers.record import Shapes, Tensors, pack, unpack


@dataclass
class Stats:
    """damaged: records that were not what was stored, and are gone. failed: calls that the store did not answer.
    refused: records larger than the tier. foreign: files that are no records, left alone."""

    hits: int = 0
    misses: int = 0
    puts: int = 0
    evicted: int = 0
    damaged: int = 0
    failed: int = 0
    refused: int = 0
    foreign: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class Tier(ABC):
    """Up to `bound` bytes of records; the one that was used longest ago goes first. For use by several threads.

    A store that fails costs a page, never an answer: `failures` are counted and read as absence.
    """

    failures: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, bound: int) -> None:
        if bound < 1:
            raise ValueError(f"cache tier: bytes is {bound}; accepted: 1 or more")
        self.bound = bound
        self._stats, self._counting = Stats(), threading.Lock()

    @abstractmethod
    def _read(self, name: str) -> bytes | None:
        """The record, which is then the one used last."""

    @abstractmethod
    def _write(self, name: str, blob: bytes) -> int:
        """Keep it; how many others had to go."""

    @abstractmethod
    def _drop(self, name: str) -> None: ...

    @abstractmethod
    def _has(self, name: str) -> bool: ...

    @abstractmethod
    def held(self) -> int:
        """Bytes of all records, those of other processes included."""

    def get(self, name: str, shapes: Shapes) -> dict[str, Tensor] | None:
        """The record's tensors on the host, if it is there and is what was stored."""
        try:
            blob = self._read(name)
            tensors = None if blob is None else self._checked(blob, name, shapes)
        except self.failures:
            self._count(failed=1)
            blob = tensors = None
        if blob is None or tensors is None:
            self._count(misses=1)
            return None
        self._count(hits=1, bytes_read=len(blob))
        return tensors

    def _checked(self, blob: bytes, name: str, shapes: Shapes) -> dict[str, Tensor] | None:
        try:
            return unpack(blob, name, shapes)
        except ValueError:
            self._count(damaged=1)
            self._drop(name)
            return None

    def put(self, name: str, tensors: Tensors) -> None:
        """Keep these, unless the name is there already: equal names are equal contents."""
        try:
            if self._has(name):
                return
            blob = pack(name, tensors)
            if len(blob) > self.bound:
                self._count(refused=1)
                return
            evicted = self._write(name, blob)
            self._count(puts=1, evicted=evicted, bytes_written=len(blob))
        except self.failures:
            self._count(failed=1)

    def stats(self) -> dict[str, int]:
        with self._counting:
            return asdict(self._stats)

    def close(self) -> None:
        """Nothing is needed, except where a connection is open."""
        return None

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, count in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)
