"""Memory that is read from end to end, in pages of 2 MiB. With pages of 4 KiB a processor looks up where one stands as
often as it reads one, and on a virtual machine that is two tables deep: a tenth and more of a decode step on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator

from torch import Tensor

from assay.ops.packed import Packed

LARGE = 1 << 21
ADVISE, COLLAPSE = 14, 25  # Linux's MADV_HUGEPAGE, and MADV_COLLAPSE since 6.1


def in_large_pages(tensors: Iterable[Tensor]) -> bool:
    """Ask the kernel to hold the memory of these in large pages, what is there already and what is yet to be touched.
    False where it has none to give, or nothing here is as large; contents and addresses stay."""
    runs = list(spans(held(tensors))) if sys.platform == "linux" else []
    if not runs:
        return False
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    asked = [advise(first, last - first, ADVISE) for first, last in runs]
    for first, last in runs:
        advise(first, last - first, COLLAPSE)  # what fails here the kernel does by and by
    return not any(asked)


def held(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """First and last address of each tensor on a CPU."""
    for tensor in tensors:
        own = tensor.codes if isinstance(tensor, Packed) else tensor
        if own.device.type == "cpu" and own.numel():
            storage = own.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def spans(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Whole large pages inside runs of these pieces; pieces with less than such a page between them are one run."""
    found: list[list[int]] = []
    for first, last in sorted(pieces):
        if found and first - found[-1][1] < LARGE:
            found[-1][1] = max(found[-1][1], last)
        else:
            found.append([first, last])
    whole = ((-(-first // LARGE) * LARGE, last // LARGE * LARGE) for first, last in found)
    return ((first, last) for first, last in whole if first < last)
