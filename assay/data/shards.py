"""Token shards: a list of documents encoded once, memory-mapped ever after.

Two files, `<key>.bin` and `<key>.json`. The first is the ids of all documents one after another, each document
begun as the tokenizer begins a text and ended by its end-of-text id, as raw little-endian uint16 (uint32 where the
vocabulary needs it). The second is an object:

    format       "assay-tokens"
    version      1
    dtype        "<u2" or "<u4"
    offsets      where each document starts in the .bin, in tokens, and last the number of tokens
    token_bytes  for every id of the vocabulary, how many UTF-8 bytes it stands for (0: a special token)
    sha256       of the .bin
    documents    digest of the names and texts
    tokenizer    digest of the tokenizer

The .json is moved into place last, so that where it exists the shard is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.data.documents import Documents
from assay.data.documents import default_cache as default_cache
from assay.data.tokenizers import Tokenizer

FORMAT = "assay-tokens"
VERSION = 1
KEYS = frozenset({"format", "version", "dtype", "offsets", "token_bytes", "sha256", "documents", "tokenizer"})


@dataclass(frozen=True)
class Shard:
    """Documents as ids: document i is tokens[offsets[i] : offsets[i + 1]], its end-of-text id included.

    token_bytes[id] is how many UTF-8 bytes an id stands for; digest names the contents.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    token_bytes: NDArray[np.int64]
    digest: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> NDArray[np.int64]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def part(self, first: int, last: int) -> Shard:
        """Documents first .. last - 1, on the same memory."""
        offsets = self.offsets[first : last + 1]
        tokens = self.tokens[offsets[0] : offsets[-1]]
        return Shard(tokens, offsets - offsets[0], self.token_bytes, f"{self.digest} {first} {last}")

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def is_bytes(self) -> bool:
        """Whether ids are bytes, as synthetic documents are."""
        return self.vocab_size == 256 and bool((self.token_bytes == 1).all())

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], token_bytes: Sequence[int] | None = None) -> Shard:
        """A shard in memory, from documents that already end as they should; by default ids are bytes."""
        lengths = np.asarray([len(document) for document in documents], np.int64)
        tokens = np.concatenate([np.asarray(document, np.int64) for document in documents])
        table = np.ones(256, np.int64) if token_bytes is None else np.asarray(token_bytes, np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        digest = hashlib.sha256(offsets.tobytes() + tokens.tobytes() + table.tobytes()).hexdigest()
        return cls(tokens, offsets, table, digest)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map `<key>.json` and its .bin. ValueError, saying what is wrong, unless they agree to the last byte."""
        return _Opening(path).shard()


class _Opening:
    """The checks of an index against its tokens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path.with_suffix(".bin")

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}; delete it to have the corpus encoded again")

    def index(self) -> dict[str, Any]:
        try:
            index = json.loads(self.path.read_text("utf-8"))
        except ValueError as error:
            raise self.refuse(f"not JSON ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise self.refuse(f"not an index of {FORMAT}")
        if index.get("version") != VERSION:
            raise self.refuse(f"version {index.get('version')!r}; this release reads version {VERSION}")
        if KEYS - set(index):
            raise self.refuse(f"lacks {', '.join(sorted(KEYS - set(index)))}")
        if index["dtype"] not in ("<u2", "<u4"):
            raise self.refuse(f"dtype {index['dtype']!r}; accepted: '<u2', '<u4'")
        return index

    def integers(self, index: dict[str, Any], name: str) -> NDArray[np.int64]:
        values = index[name]
        if not isinstance(values, list) or not values or not all(type(v) is int and v >= 0 for v in values):
            raise self.refuse(f"{name} is not a list of whole numbers from 0")
        return np.asarray(values, np.int64)

    def shard(self) -> Shard:
        index = self.index()
        offsets, token_bytes = self.integers(index, "offsets"), self.integers(index, "token_bytes")
        size = self.bin.stat().st_size if self.bin.is_file() else -1
        promised = int(offsets[-1]) * np.dtype(index["dtype"]).itemsize
        if size != promised:
            raise self.refuse(f"{self.bin.name} has {size} bytes, the index promises {promised}")
        if offsets[0] != 0 or (np.diff(offsets) < 1).any():
            raise self.refuse("offsets do not rise from 0")
        with self.bin.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != index["sha256"]:
            raise self.refuse(
                f"{self.bin.name} has sha256 {found[:12]}..., the index promises {index['sha256'][:12]}..."
            )
        tokens = np.memmap(self.bin, index["dtype"], "r")
        if int(tokens.max()) >= len(token_bytes):
            raise self.refuse(f"token id {tokens.max()}, but the vocabulary has {len(token_bytes)}")
        return Shard(tokens, offsets, token_bytes, _digest(index["documents"], index["tokenizer"]))


def encode_documents(documents: Documents, tokenizer: Tokenizer, cache: Path) -> Shard:
    """The shard of these documents under this tokenizer: from the cache folder, or encoded into it.

    Any number of processes may ask at once: one encodes, the others wait for it.
    """
    if not len(documents):
        raise ValueError("there are no documents to encode")
    digest = _digest(documents.digest, tokenizer.digest)
    path = cache / f"{digest[:32]}.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{digest[:32]}.lock"):
            if not path.exists():
                _write(path, documents, tokenizer)
    shard = Shard.open(path)
    if shard.digest != digest:
        raise ValueError(f"{path}: holds another corpus or tokenizer; delete it to have the corpus encoded again")
    return shard


def _digest(documents: str, tokenizer: str) -> str:
    return hashlib.sha256(f"{documents} {tokenizer}".encode()).hexdigest()


def _write(path: Path, documents: Documents, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    if eos is None:
        raise ValueError("the tokenizer has no eos_token (tokenizer_config.json), and documents must end with one")
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    total, offsets = hashlib.sha256(), [0]
    parts = [path.with_name(f"{path.stem}.{os.getpid()}.{kind}.part") for kind in ("bin", "json")]
    try:
        with parts[0].open("wb") as file:
            for text in documents:
                data = np.append(tokenizer.begun(text), eos).astype(dtype)
                offsets.append(offsets[-1] + len(data))
                total.update(data.tobytes())
                file.write(data.tobytes())
        token_bytes = [len(piece) for piece in tokenizer.token_bytes]
        index: dict[str, Any] = {"format": FORMAT, "version": VERSION, "dtype": dtype, "sha256": total.hexdigest()}
        index |= {"documents": documents.digest, "tokenizer": tokenizer.digest}
        parts[1].write_text(json.dumps(index | {"token_bytes": token_bytes, "offsets": offsets}), "utf-8")
        os.replace(parts[0], path.with_suffix(".bin"))
        os.replace(parts[1], path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, which stays behind empty (removing it would let two holders in)."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
