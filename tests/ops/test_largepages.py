"""Memory that is streamed stands in large pages, where there are any, and is what it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.ops.largepages import LARGE, held, in_large_pages, spans
from assay.ops.packed import pack

SMAPS = Path("/proc/self/smaps")


def large_bytes(address: int) -> int:
    """Of the mapping that holds this address, as the kernel counts them."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.skipif(not SMAPS.is_file(), reason="Linux tells what pages are large")
def test_memory_is_moved_to_large_pages_and_stays_as_it_was() -> None:
    held_in = torch.arange(1 << 21, dtype=torch.float32)
    at = held_in.data_ptr()
    before = large_bytes(at + LARGE)  # the first whole one begins before it
    release = tuple(map(int, re.findall(r"\d+", Path("/proc/sys/kernel/osrelease").read_text())[:2]))
    if not in_large_pages([held_in]) or release < (6, 1):
        pytest.skip("this kernel has no large pages to give at once")
    assert large_bytes(at + LARGE) >= before + 2 * LARGE
    assert held_in.data_ptr() == at and torch.equal(held_in, torch.arange(1 << 21, dtype=torch.float32))


def test_what_is_smaller_than_a_page_is_left_alone() -> None:
    assert not in_large_pages([torch.zeros(100), pack(torch.ones(16, 32), 4)])


def test_a_packed_matrix_is_where_its_codes_are_and_a_view_where_its_storage_is() -> None:
    w, x = pack(torch.ones(16, 64), 8), torch.zeros(8, 4)
    first, last = w.codes.data_ptr(), w.codes.data_ptr() + w.codes.numel()
    assert list(held([w, x[3:]])) == [(first, last), (x.data_ptr(), x.data_ptr() + 128)]
    assert list(held([torch.zeros(2, device="meta"), torch.zeros(0)])) == []


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8))
def test_spans_are_the_large_pages_that_runs_fill(drawn: list[tuple[int, int]]) -> None:
    """In quarters of a large page; the oracle marks them one by one."""
    quarter = LARGE // 4
    pieces = [(first * quarter, (first + count) * quarter) for first, count in drawn]
    touched = sorted({q for first, count in drawn for q in range(first, first + count)})
    runs: list[list[int]] = []
    for q in touched:
        if runs and q - runs[-1][-1] <= 4:
            runs[-1].append(q)
        else:
            runs.append([q])
    expected = [(-(-run[0] // 4) * LARGE, (run[-1] + 1) // 4 * LARGE) for run in runs]
    assert list(spans(pieces)) == [run for run in expected if run[0] < run[1]]
