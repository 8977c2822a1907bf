"""Free memory that the process still holds, given back to the system.

Replies of all lengths leave holes in the heap of the C library (glibc), between blocks that stay: what is in use does
not grow, but what the process occupies does, for hours. `malloc_trim` gives whole free pages back, in milliseconds.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

EVERY_S = 10.0


def trimmer() -> Callable[[], object]:
    """glibc's `malloc_trim(0)`; nothing where the C library has none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: None) if trim is None else lambda: trim(0)


class Tidy:
    """Call it as often as you like: it trims once in `every` seconds."""

    def __init__(self, every: float = EVERY_S, trim: Callable[[], object] | None = None) -> None:
        self.every, self.trim, self.last = every, trim or trimmer(), time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.last >= self.every:
            self.trim()
            self.last = now
