"""Good files with bytes changed, cut out, repeated or made extreme numbers are read or refused, never worse."""

from __future__ import annotations

import struct
import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.hub.gguf import read_gguf
from assay.hub.gguf_config import source_of
from assay.hub.gguf_names import ARCHITECTURES
from assay.hub.load import planned
from tests.fuzz import mutate
from tests.fuzz.seeds import OTHERS, seeds
from tests.fuzz.targets import TARGETS, holds

PEAK = 100_000_000
"""Bytes that a target may hold at once for a file of a few thousand."""
NUMBERS = [0, 1, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


@cache
def good(name: str) -> tuple[bytes, ...]:
    return tuple(seeds(name))


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """A good file after one to four changes, most of them near its beginning, where the headers are; or after changes
    that leave its form."""
    first = draw(st.sampled_from(good(name)))
    if name in mutate.CHANGES and draw(st.booleans()):
        return mutate.changed(name, first, draw(st.integers(0, 1 << 32))) or first
    data = bytearray(first)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([64, 1024, len(data)]))) - 1)))
        size = draw(st.integers(1, 32))
        what = draw(st.sampled_from(["flip", "number", "cut", "end", "repeat", "bytes"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "number":
            form = draw(st.sampled_from(["<Q", "<I"]))
            number = struct.pack(form, draw(st.sampled_from(NUMBERS)) % (1 << 8 * struct.calcsize(form)))
            data[at : at + len(number)] = number
        elif what == "cut":
            del data[at : at + size]
        elif what == "end":
            del data[at:]
        elif what == "repeat":
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_good_files_are_good(name: str) -> None:
    """All are read, but for tensors of numbers that no weight is, which are refused."""
    refused = [data for data in good(name) if not holds(name, data)]
    assert len(refused) == (len(OTHERS) if name == "safetensors" else 0)


def test_every_good_gguf_file_of_a_model_is_one(tmp_path: Path) -> None:
    """Whatever else is said of it: the plan of a model is found."""
    for number, data in enumerate(good("gguf")[: len(ARCHITECTURES) + 1]):
        (path := tmp_path / f"{number}.gguf").write_bytes(data)
        assert planned(source_of(read_gguf(path)))[0]


@pytest.mark.parametrize("name", mutate.CHANGES)
def test_changes_leave_the_form(name: str) -> None:
    """Most of what is changed is still such a file; nothing changed gives the same bytes."""
    made = [mutate.changed(name, data, number) for number in range(20) for data in good(name)[:10]]
    assert sum(data is None for data in made) < 0.1 * len(made)
    assert all(mutate.Parsed.of(data).bytes() == data for data in good("gguf"))


def look(name: str, examples: int) -> None:
    """Any number of changed files; the first that is a defect is made small and shown."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(changed(name))
    def each(data: bytes) -> None:
        tracemalloc.start()
        try:
            holds(name, data)
            assert tracemalloc.get_traced_memory()[1] < PEAK
        finally:
            tracemalloc.stop()

    each()


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_read_or_refused(name: str) -> None:
    look(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_files_are_read_or_refused(name: str) -> None:
    look(name, 3000)
