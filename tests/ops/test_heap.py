"""Memory of the size of an activation is touched for the first time once, and not whenever it is taken again; products
of many shapes are not all remembered."""

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


SHAPES = """
import sys, torch
from assay.cli.serve import keep_few_products

if sys.argv[1:]:
    keep_few_products()
torch.set_num_threads(1)
w = torch.randn(64, 64).bfloat16()

def resident() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

for rows in range(65, 315):
    torch.mm(torch.randn(rows, 64).bfloat16(), w)
before = resident()
for rows in range(315, 665):
    torch.mm(torch.randn(rows, 64).bfloat16(), w)
print(round(resident() - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc")
def test_products_of_many_shapes_are_not_all_remembered() -> None:
    """Of 600 shapes 128 are: behind the first 250 memory does not grow."""

    def grown(*more: str) -> int:
        done = subprocess.run([sys.executable, "-c", SHAPES, *more], check=True, capture_output=True, text=True)
        return int(done.stdout)

    if (all_ := grown()) < 100:
        pytest.skip(f"350 shapes of products in bfloat16 take {all_} MiB here: nothing is prepared for them")
    assert grown("few") < all_ / 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is asked")
def test_what_was_freed_is_not_found_anew() -> None:
    """20 times 64 MiB, more than malloc ever keeps by itself, are 327,680 faults in pages of 4 KiB, and 640 in pages
    of 2 MiB."""

    def told(*more: str) -> int:
        done = subprocess.run([sys.executable, "-c", COUNTED, *more], check=True, capture_output=True, text=True)
        return int(done.stdout)

    assert told("kept") < 100 < 500 < told()
