"""Free memory that the process still holds, given back to the system.

Replies of all lengths leave holes in the heap of the C library (glibc), between blocks that stay: what is in use does
not grow, but what the process occupies does, for hours. `malloc_trim` gives whole free pages back. Among them are those
of the activations, which the next step takes again and pays for page by page (`ops/heap.py`): so it is asked for when a
server has come to rest, and seldom while it works.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from assay.ops.heap import give_back

WORKING_S, RESTED_S = 60.0, 1.0


class Tidy:
    """Trims once in `working` seconds in which there was work, and once after `rested` seconds without."""

    def __init__(
        self, working: float = WORKING_S, rested: float = RESTED_S, trim: Callable[[], object] = give_back
    ) -> None:
        self.working, self._rested, self._trim = working, rested, trim
        self._last, self._owed = time.monotonic(), True

    @property
    def patience(self) -> float | None:
        """Seconds of rest until `rested` is to be called; None where that would do nothing."""
        return self._rested if self._owed else None

    def worked(self) -> None:
        """After each step."""
        self._owed = True
        if time.monotonic() - self._last >= self.working:
            self._now()

    def rested(self) -> None:
        """After a rest: nothing where nothing was done since the last one."""
        if self._owed:
            self._now()
            self._owed = False

    def _now(self) -> None:
        self._trim()
        self._last = time.monotonic()
