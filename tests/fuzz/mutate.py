"""One thing changed in a file whose lengths and counts stay right, which changed bytes seldom leave so."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from assay.hub.gguf import ARRAY, SCALARS, STRING

Place = tuple[str | int, ...]
Change = Callable[[bytes, random.Random], bytes]
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 1 << 16, 10_001, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, 0.5, 1e38)
WORDS = (
    "",
    "x",
    "a b",
    "ab",
    "\u2581",
    "<0x41>",
    "<s>",
    "llama",
    "gpt2",
    "default",
    "(a+)+$",
    "[",
    "\\p{L}",
    "a" * 600,
)
ANY: tuple[Any, ...] = (*NUMBERS, *WORDS, True, False, None, [], {}, [1], ["x"], [[]], {"a": 1}, float("nan"), 10**400)


def changed(name: str, data: bytes, number: int) -> bytes | None:
    """The file with one to three things changed, as `number` draws them; None for one that is no such file."""
    draw = random.Random(number)
    try:
        for _ in range(draw.randint(1, 3)):
            data = CHANGES[name](data, draw)
    except (ValueError, IndexError, KeyError, RecursionError, struct.error):
        return None
    return data


def json_changed(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(tree_changed(json.loads(data), draw)).encode()


def header_changed(data: bytes, draw: random.Random) -> bytes:
    """safetensors: 8 bytes say how long the JSON is that follows."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(tree_changed(json.loads(data[8 : 8 + size]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def tree_changed(tree: Any, draw: random.Random) -> Any:
    """Another value at one place, one that stands elsewhere, none, or one more."""
    there = list(places(tree))
    place = draw.choice(there)
    above = tree
    for key in place[:-1]:
        above = above[key]
    key, what = place[-1], draw.random()
    if what < 0.5:
        above[key] = draw.choice(ANY)
    elif what < 0.8:
        above[key] = json.loads(json.dumps(at(tree, draw.choice(there))))
    elif what < 0.9 and isinstance(above, dict):
        above[draw.choice((str(draw.choice(there)[-1]), "x"))] = above.pop(key)
    else:
        del above[key]
    return tree


def at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def places(tree: Any, above: Place = ()) -> Iterator[Place]:
    """Every key and index of a tree, with those above it."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*above, key)
        yield from places(value, (*above, key))


@dataclass
class Parsed:
    """A GGUF file: values as [key, type, value] (of an array: [type, items]), tensors as [name, shape, type, place]."""

    values: list[list[Any]] = field(default_factory=list)
    tensors: list[list[Any]] = field(default_factory=list)
    data: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Parsed:
        read = _Reader(data, 8)
        tensors, values = read.number("Q"), read.number("Q")
        found = cls()
        for _ in range(values):
            key, kind = read.text(), read.number("I")
            found.values.append([key, kind, read.value(kind)])
        for _ in range(tensors):
            name = read.text()
            shape = [read.number("Q") for _ in range(read.number("I"))]
            found.tensors.append([name, shape, read.number("I"), read.number("Q")])
        found.data = data[-(-read.at // 32) * 32 :]
        return found

    def bytes(self) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.values))
        for key, kind, value in self.values:
            out += text(key) + struct.pack("<I", kind) + packed(kind, value)
        for name, shape, kind, place in self.tensors:
            out += text(name) + struct.pack("<I", len(shape)) + b"".join(number("Q", n) for n in shape)
            out += number("I", kind) + number("Q", place)
        return out + bytes(-len(out) % 32) + self.data


def gguf_changed(data: bytes, draw: random.Random) -> bytes:
    found = Parsed.of(data)
    if draw.random() < 0.3 and found.tensors:
        entry, which = draw.choice(found.tensors), draw.randrange(4)
        other = draw.choice(found.tensors)[which]
        sizes = [draw.choice((*NUMBERS, *range(40))) for _ in range(draw.randint(0, 5))]
        entry[which] = draw.choice(
            ((draw.choice(WORDS), other), (sizes, other), (draw.randrange(42),), (32, 64, other))[which]
        )
        return found.bytes()
    line, what = draw.choice(found.values), draw.random()
    if what < 0.1:
        found.values.remove(line)
    elif what < 0.2:
        line[0] = draw.choice(found.values)[0]
    elif what < 0.3:
        line[1:] = draw.choice(found.values)[1:]
    elif line[1] == ARRAY:
        items = line[2][1]
        i = draw.randint(0, len(items))
        items[i : i + draw.randint(0, 2)] = [draw.choice((*NUMBERS, *WORDS, *items))] * draw.randint(0, 2)
    else:
        line[2] = draw.choice(WORDS if line[1] == STRING else NUMBERS)
    return found.bytes()


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise ValueError("cut short")
        return [inner, [self.value(inner) for _ in range(count)]]


def packed(kind: int, value: Any) -> bytes:
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(packed(inner, item) for item in items)
    return text(str(value)) if kind == STRING else number(SCALARS[kind], value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(form: str, value: Any) -> bytes:
    """Of what does not fit the lowest bytes; of what is no number zero."""
    given = value if isinstance(value, int | float) else 0
    if form in "fd":
        return struct.pack("<" + form, min(float(given), 3e38))
    size = struct.calcsize("<" + form)
    whole = bool(given) if form == "?" else int(given)
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


CHANGES: dict[str, Change] = {
    "gguf": gguf_changed,
    "safetensors": header_changed,
    "config": json_changed,
    "tokenizer": json_changed,
}
