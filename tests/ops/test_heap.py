"""Memory of the size of an activation is touched for the first time once, and not whenever it is taken again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNTED = """
import resource, sys, torch
from assay.ops.heap import keep_freed

assert not sys.argv[1:] or keep_freed()

def faults() -> int:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = torch.ones(1 << 24)
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is asked")
def test_what_was_freed_is_not_found_anew() -> None:
    """20 times 64 MiB, more than malloc ever keeps by itself, are 327,680 faults in pages of 4 KiB, and 640 in pages
    of 2 MiB."""

    def told(*more: str) -> int:
        done = subprocess.run([sys.executable, "-c", COUNTED, *more], check=True, capture_output=True, text=True)
        return int(done.stdout)

    assert told("kept") < 100 < 500 < told()
