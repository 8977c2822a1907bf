"""Memory that is freed stays with the process, until it is given back."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

TRIM, LARGE = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
MOST = 2**31 - 1


@cache
def keep_freed() -> bool:
    """Ask glibc's malloc to give nothing back to the kernel; False where there is no glibc. The activations of a layer
    are as large as those of the one before, but by default each is a new piece of memory, whose pages the kernel finds
    and clears one by one as they are touched: a tenth and more of reading a prompt or of a training step on a CPU."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, value) == 1 for name, value in ((LARGE, 1 << 30), (TRIM, MOST)))


def give_back() -> None:
    """Return to the kernel what is free (glibc's `malloc_trim`); nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
