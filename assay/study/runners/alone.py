"""Timings without a neighbour: while one process of a pool times something, the others stand still.

Two locks on files, so that a process that is killed gives up what it held. Every process holds the room, shared; who
wants it alone takes the gate first, where the others wait as they pass by, so that it is never starved.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

GATE, ROOM = ".gate", ".room"


class Room:
    """One process's place among those that share a folder on one machine. Use it as a context.

    Nobody else may be inside while `alone` runs, so every process must call `pass_by` every now and then.
    """

    def __init__(self, folder: Path) -> None:
        self._gate, self._room = (os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (GATE, ROOM))

    def __enter__(self) -> Self:
        self._come_in()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._room)
        os.close(self._gate)

    def _come_in(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)

    def pass_by(self) -> float:
        """Stand aside for whoever waits to be alone; the seconds that took."""
        start = time.perf_counter()
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self._come_in()
        return time.perf_counter() - start

    @contextmanager
    def alone(self) -> Iterator[None]:
        fcntl.flock(self._room, fcntl.LOCK_UN)
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            self.pass_by()
