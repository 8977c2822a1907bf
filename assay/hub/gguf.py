"""GGUF, llama.cpp's file: typed values, then tensors, most of them in blocks of quantised numbers.

The header is read here, and every count, size and place in it is checked against the file before anything is made of
it; the `gguf` package turns blocks into numbers. Layout: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PIECE = 1 << 18
"""Numbers that are turned into float32 at once: a multiple of every type's block."""
ALIGNMENT, MAX_ALIGNMENT, MAX_AXES = 32, 1 << 16, 4
MAX_NAME, MAX_TEXT, MAX_ITEMS, MAX_NESTING = 1 << 10, 1 << 26, 1 << 22, 4
"""Bytes of a name, bytes of all strings together, values and tensors together, arrays inside arrays."""


def _becomes_numbers(kind: GGMLQuantizationType) -> bool:
    """Whether the package dequantises a type: it is asked for one block, since its versions know more and more."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


TYPES = frozenset(kind.name for kind in GGML_QUANT_SIZES if _becomes_numbers(kind))
"""What becomes float32 here: the types that the `gguf` package dequantises."""


@dataclass(frozen=True)
class Entry:
    """A tensor in the file. shape: slowest axis first, as in torch; start: its first byte; row: bytes of a row."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    row: int

    @property
    def size(self) -> int:
        return self.row * prod(self.shape[:-1])


@dataclass(frozen=True)
class Gguf:
    """The values and tensors of a file, which stays mapped and is never held whole."""

    where: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    data: NDArray[np.uint8]

    def read(self, name: str, part: int | None = None) -> Tensor:
        """A tensor in float32; part: only this slice of its first axis."""
        entry = self.tensors[name]
        shape = entry.shape if part is None else entry.shape[1:]
        size = entry.row * prod(shape[:-1])
        start = entry.start + (part or 0) * size
        found = np.empty(prod(shape), np.float32)
        block, stored = GGML_QUANT_SIZES[entry.kind]
        # As one row, and a piece at a time: quicker than row by row, and what lies in between stays small.
        for i in range(0, len(found), PIECE):
            blocks = self.data[start + i // block * stored : start + min(size, (i + PIECE) // block * stored)]
            found[i : i + PIECE] = dequantize(blocks.reshape(1, -1), entry.kind).ravel()
        return torch.from_numpy(found).view(shape)


def read_gguf(path: Path) -> Gguf:
    """Read the header of a file and map the rest. ValueError for one that is cut short, lies about its contents, or
    holds what nothing here reads."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: {path.stat().st_size} bytes: not a GGUF file, or one that was cut short")
    data = np.memmap(path, np.uint8, "r")
    head = _Header(data.data, str(path))
    if bytes(head.take(4, "magic")) != MAGIC:
        raise ValueError(f"{path}: not a GGUF file: it does not begin with GGUF")
    version = head.number("I", "version")
    if version not in VERSIONS:
        odd = " (written for a big-endian machine)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"{path}: GGUF version {version}{odd}; accepted: {', '.join(map(str, VERSIONS))}")
    # A value takes at least a name's length, a type and a byte; a tensor a length, axes, one size, a type, a place.
    tensors, values = head.count(32, "tensors"), head.count(13, "values")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = head.name("name of a value")
        if key in metadata:
            raise ValueError(f"{path}: {key}: stands twice")
        metadata[key] = head.value(head.number("I", f"{key}: type"), key)
    if metadata.get("split.count", 1) != 1:
        raise ValueError(f"{path}: one of {metadata['split.count']!r:.80} files; merge them (llama-gguf-split --merge)")
    return Gguf(str(path), metadata, _entries(head, tensors, _alignment(metadata, str(path))), data)


def _alignment(metadata: Mapping[str, Any], where: str) -> int:
    found = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(found, int) or not 1 <= found <= MAX_ALIGNMENT or found & (found - 1):
        raise ValueError(f"{where}: general.alignment: {found!r:.80}; a power of two up to {MAX_ALIGNMENT} is expected")
    return found


def _entries(head: _Header, count: int, alignment: int) -> dict[str, Entry]:
    """The table of tensors; their bytes lie after it, in the file, and none in those of another."""
    found = [_entry(head, alignment) for _ in range(count)]
    first = -(-head.at // alignment) * alignment
    placed: dict[str, Entry] = {}
    end, before = first, ""
    for entry in sorted(found, key=lambda e: e.start):
        start, where = first + entry.start, f"{head.where}: {entry.name}"
        if start + entry.size > len(head.data):
            raise ValueError(f"{where}: bytes {start} to {start + entry.size}; the file has {len(head.data)}")
        if start < end:
            raise ValueError(f"{where}: its bytes are also those of {before}")
        if entry.name in placed:
            raise ValueError(f"{where}: stands twice")
        placed[entry.name] = Entry(entry.name, entry.shape, entry.kind, start, entry.row)
        end, before = start + entry.size, entry.name
    return placed


def _entry(head: _Header, alignment: int) -> Entry:
    """One line of the table; `start` is still counted from the table's end."""
    name = head.name("name of a tensor")
    where = f"{head.where}: {name}"
    axes = head.number("I", f"{name}: axes")
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(f"{where}: {axes} axes; accepted: 1 to {MAX_AXES}")
    shape = tuple(head.number("Q", f"{name}: shape") for _ in range(axes))[::-1]
    number, start = head.number("I", f"{name}: type"), head.number("Q", f"{name}: place")
    kind = next((k for k in GGMLQuantizationType if k == number), None)
    if kind is None or kind.name not in TYPES:
        told = f"{number} ({kind.name})" if kind is not None else str(number)
        raise ValueError(f"{where}: type {told}; accepted: {', '.join(sorted(TYPES))}")
    block, size = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{where}: shape {shape}; sizes of 1 or more, rows of whole blocks of {block} ({kind.name})")
    if start % alignment:
        raise ValueError(f"{where}: begins at {start}, which is no multiple of the alignment {alignment}")
    return Entry(name, shape, kind, start, shape[-1] // block * size)


class _Header:
    """Reads on from the file's beginning. ValueError where the file ends before what it announces, or announces more
    than a model's header holds."""

    def __init__(self, data: memoryview, where: str) -> None:
        self.data, self.where, self.at = data, where, 0
        self._items, self._text = MAX_ITEMS, MAX_TEXT

    def take(self, size: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if size > left:
            raise ValueError(f"{self.where}: {what}: {size} bytes are announced and {left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str, what: str) -> Any:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))
        return value

    def count(self, least: int, what: str) -> int:
        """How many items follow, each of at least `least` bytes."""
        found: int = self.number("Q", what)
        left = len(self.data) - self.at
        if found * least > left:
            raise ValueError(f"{self.where}: {what}: {found} are announced; the {left} bytes left cannot hold them")
        self._items -= found
        if self._items < 0:
            raise ValueError(f"{self.where}: {what}: {found}; at most {MAX_ITEMS} values and tensors are read")
        return found

    def text(self, what: str, most: int = MAX_TEXT) -> str:
        size = self.number("Q", what)
        if size > most:
            raise ValueError(f"{self.where}: {what}: a string of {size} bytes; at most {most} are accepted")
        self._text -= size
        if self._text < 0:
            raise ValueError(f"{self.where}: {what}: more than {MAX_TEXT} bytes of strings")
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: {what}: not UTF-8: {error.reason} at byte {error.start}") from None

    def name(self, what: str) -> str:
        found = self.text(what, MAX_NAME)
        if not found.isprintable():
            raise ValueError(f"{self.where}: {what}: {found!r:.80}: printable characters are expected")
        return found

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            raise ValueError(f"{self.where}: {what}: type {kind} of a value; accepted: 0 to 12")
        if depth == MAX_NESTING:
            raise ValueError(f"{self.where}: {what}: arrays nested more than {MAX_NESTING} deep")
        inner = self.number("I", what)
        if inner in SCALARS:
            size = struct.calcsize("<" + SCALARS[inner])
            count = self.count(size, what)
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * size, what)))
        return [self.value(inner, what, depth + 1) for _ in range(self.count(8, what))]
