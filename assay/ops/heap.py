"""What a process keeps for the next step: memory that is freed, until it is given back, and prepared products."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

TRIM, LARGE = -1, -3  # mallopt's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
MOST = 2**31 - 1
PREPARED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


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


def keep_few_products() -> None:
    """Ask oneDNN, and torch before it, to remember 128 shapes of products. By itself each remembers 1,024, of 0.3 to
    0.9 MB: prompts of all lengths come to 700 MiB in float32 and 950 in bfloat16. To prepare one takes half a
    millisecond, which a step pays for each of a layer's widths. Heeded by a process that has multiplied nothing yet;
    what the environment says already stands. For servers: the steps of a long training may have more shapes."""
    for name, count in PREPARED.items():
        os.environ.setdefault(name, count)
