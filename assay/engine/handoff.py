"""A reply on its way from the engine that read its prompt to the one that goes on with it: as a value, and as bytes."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from assay.cache import Paged, Swapped
from assay.cache.coded import Quantised
from assay.cache.groups import PageBook
from assay.cache.prefix import Text
from assay.cache.store import Store
from assay.cache.tables import Book
from assay.engine.request import Request
from assay.ops.state import dtype_of

VERSION = "1"
MAC = 32  # bytes


@dataclass(frozen=True)
class Handed:
    """A reply that has begun: what was asked, tokens said so far, and everything that is stored of the sequence.

    arrival: of the request, by the engines' clock. reused: tokens of the prompt that were stored before. layout: of the
    cache that it comes from; one with another layout cannot take it.
    """

    request: Request
    choice: int
    said: tuple[int, ...]
    arrival: float
    reused: int
    layout: str
    swapped: Swapped

    def fitted(self, cache: Store) -> Swapped:
        """What is stored, as this cache stores it: in fewer bits, where only that differs. ValueError where it cannot
        take it."""
        if self.layout == layout(cache):
            return self.swapped
        if isinstance(cache, Quantised) and self.layout == layout(cache, whole=True):
            return cache.fitted(self.swapped)
        raise ValueError(
            f"the reply comes from a cache with layout {self.layout}; accepted: {' or '.join(layouts(cache))}, as the "
            "same model, dtype, page and context give"
        )


def layouts(cache: Store) -> list[str]:
    """Of caches whose sequences this one takes."""
    return list(dict.fromkeys([layout(cache), layout(cache, whole=True)]))


def layout(cache: Store, whole: bool = False) -> str:
    """A digest of how a sequence is stored: fields, dtypes, entries. How many sequences there is room for is not in
    it. whole: as it would be without formats."""
    plain = whole and isinstance(cache, Quantised)
    fields = [
        (part, f.name, f.per, str(dtype_of(f, cache.dtype) if plain else pool.dtype), *pool.shape[1:])
        for part, declared in cache.fields.items()
        for f, pool in ((f, cache.pools[part][f.name]) for f in declared)
    ]
    depth = None if cache.saves is None else cache.saves.depth
    kind = (Paged.__name__, str(cache.dtype)) if plain else (type(cache).__name__, getattr(cache, "format_key", ""))
    return hashlib.sha256(json.dumps([fields, depth, *kind]).encode()).hexdigest()[:16]


def pack(handed: Handed, key: bytes) -> bytes:
    """A safetensors file whose metadata says the rest as JSON, and behind it the BLAKE2b of it all under `key`."""
    moved = handed.swapped
    tensors: dict[str, Tensor] = {f"field.{i}": t for i, t in enumerate(moved.tensors.values())}
    for i, book in enumerate(moved.books.values()):
        tensors |= {f"book.{i}.index": book.index, f"book.{i}.positions": book.positions}
    tensors |= {f"table.{i}": table.positions for i, table in enumerate(moved.tables.values())}
    blob = save({name: t.contiguous() for name, t in tensors.items()}, {"assay": VERSION, "about": _about(handed)})
    return blob + _mac(blob, key)


def unpack(data: bytes, key: bytes) -> Handed:
    """The reverse. ValueError for bytes that were not packed under this key, or have changed since."""
    blob, mac = data[:-MAC], data[-MAC:]
    if not hmac.compare_digest(mac, _mac(blob, key)):
        raise ValueError(f"a handed-over reply of {len(data)} bytes is damaged, or comes from elsewhere")
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    if header["assay"] != VERSION:
        raise ValueError(f"a handed-over reply of version {header['assay']}; accepted: {VERSION}")
    about = json.loads(header["about"])
    return Handed(
        Request.model_validate(about["request"]),
        about["choice"],
        tuple(about["said"]),
        about["arrival"],
        about["reused"],
        about["layout"],
        _swapped(about, load(blob)),
    )


def _mac(blob: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(blob, digest_size=MAC, key=key).digest()


def _about(handed: Handed) -> str:
    moved = handed.swapped
    text = None if moved.text is None else asdict(moved.text)
    if text is not None:
        text |= {"root": text["root"].hex(), "names": [name.hex() for name in text["names"]]}
    about = {
        "request": handed.request.model_dump(mode="json"),
        "choice": handed.choice,
        "said": handed.said,
        "arrival": handed.arrival,
        "reused": handed.reused,
        "layout": handed.layout,
        "length": moved.length,
        "fields": list(moved.tensors),
        "books": [[kind, book.low, book.high] for kind, book in moved.books.items()],
        "tables": [[kind, table.base] for kind, table in moved.tables.items()],
        "saved": moved.saved,
        "text": text,
    }
    return json.dumps(about)


def _swapped(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Swapped:
    books = {
        tuple(kind): Book(tensors[f"book.{i}.index"], tensors[f"book.{i}.positions"], low, high)
        for i, (kind, low, high) in enumerate(about["books"])
    }
    tables = {tuple(kind): PageBook(base, tensors[f"table.{i}"]) for i, (kind, base) in enumerate(about["tables"])}
    text = about["text"]
    if text is not None:
        names = [bytes.fromhex(name) for name in text["names"]]
        text = Text(bytes.fromhex(text["root"]), text["tokens"], names, text["plain"])
    saved = None if about["saved"] is None else (about["saved"][0], about["saved"][1])
    fields = {(part, name): tensors[f"field.{i}"] for i, (part, name) in enumerate(about["fields"])}
    return Swapped(about["length"], fields, books, saved, tables, text)
