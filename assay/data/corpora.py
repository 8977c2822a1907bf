"""Corpora: documents with names, split once and for all into training and validation by a hash of the name."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from assay.data.draws import Draws
from assay.spec.base import Spec

Kind = Literal["stdlib", "text", "jsonl", "generated"]

# Folders of the standard library that are left out: installed packages, tests (among them files that are invalid
# on purpose), and the codec tables, which are generated data and not text.
STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"})

USED_FIELDS: Mapping[str, frozenset[str]] = {
    "stdlib": frozenset(),
    "text": frozenset({"path", "separator", "errors"}),
    "jsonl": frozenset({"path", "field", "errors"}),
    "generated": frozenset({"seed", "documents", "document_bytes"}),
}


class CorpusSpec(Spec):
    """Which documents, and which of them are for validation.

    stdlib     the Python sources of the running interpreter's standard library: needs no download
    text       UTF-8 files at `path` (a file, a folder or a glob): a document a file, or more with `separator`
    jsonl      files of one JSON object a line; the document is the object's `field`
    generated  sentences of a small seeded grammar, the same on every machine and interpreter

    A document is for validation when sha256(name) % valid_one_in == 0. Where that leaves a side empty, one document
    is moved; a corpus of one document is cut near its end. `valid_one_in: 0` keeps everything for training.
    """

    kind: Kind = "stdlib"
    path: str | None = None
    field: str = "text"
    separator: str | None = Field(None, min_length=1)
    errors: Literal["strict", "replace"] = "strict"
    valid_one_in: int = Field(10, ge=0)
    seed: int = 0
    documents: int = Field(256, ge=1)
    document_bytes: int = Field(2048, ge=1)

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        unused = self.model_fields_set - USED_FIELDS[self.kind] - {"kind", "valid_one_in"}
        changed = sorted(name for name in unused if getattr(self, name) != type(self).model_fields[name].default)
        if changed:
            accepted = ", ".join(sorted(USED_FIELDS[self.kind] | {"valid_one_in"}))
            raise ValueError(f"corpus kind {self.kind!r} does not use {', '.join(changed)}; it uses {accepted}")
        if "path" in USED_FIELDS[self.kind] and not self.path:
            raise ValueError(f"corpus kind {self.kind!r} needs path: a file, a folder or a glob")
        if self.valid_one_in == 1:
            raise ValueError("valid_one_in: 1 leaves nothing to train on; accepted: 0 (no validation), 2 or more")
        return self


class Documents:
    """A list of texts that are read when asked for, each with a name."""

    def __init__(self, names: Sequence[str], read: Callable[[int], str]) -> None:
        self.names = tuple(names)
        self._read = read

    @classmethod
    def of(cls, texts: Sequence[str], names: Sequence[str] | None = None) -> Documents:
        """Documents in memory, named by their place unless names are given."""
        kept = tuple(texts)
        return cls([str(i) for i in range(len(kept))] if names is None else names, kept.__getitem__)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> str:
        return self._read(range(len(self))[i])

    def __iter__(self) -> Iterator[str]:
        return (self._read(i) for i in range(len(self)))

    def take(self, indices: Sequence[int]) -> Documents:
        return Documents([self.names[i] for i in indices], lambda i: self._read(indices[i]))

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and the UTF-8 texts, in order."""
        total = hashlib.sha256()
        for name, text in zip(self.names, self, strict=True):
            total.update(hashlib.sha256(name.encode()).digest())
            total.update(hashlib.sha256(text.encode()).digest())
        return total.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Two lists of documents that have none in common."""

    train: Documents
    valid: Documents

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.train.digest} {self.valid.digest}".encode()).hexdigest()


@dataclass(frozen=True)
class Piece:
    """Bytes start .. stop of a file; `where` is how a message names it."""

    path: Path
    start: int
    stop: int | None
    where: str

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read() if self.stop is None else file.read(self.stop - self.start)


def open_corpus(spec: CorpusSpec) -> Corpus:
    """The documents of a spec, split. ValueError where there are none, or (on reading) for one that is not text."""
    openers = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "generated": _generated}
    documents = openers[spec.kind](spec)
    if not len(documents):
        raise ValueError(f"corpus {spec.path or spec.kind!r} holds no documents")
    return split(documents, spec.valid_one_in)


def split(documents: Documents, valid_one_in: int) -> Corpus:
    """Validation documents are those whose sha256(name) % valid_one_in == 0; no side is left empty."""
    if valid_one_in == 0:
        return Corpus(documents, documents.take([]))
    if len(documents) == 1:
        return _cut(documents, valid_one_in)
    keys = [int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in documents.names]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    chosen = {i for i, key in enumerate(keys) if key % valid_one_in == 0} or {order[0]}
    if len(chosen) == len(keys):
        chosen.remove(order[-1])
    train = [i for i in range(len(keys)) if i not in chosen]
    return Corpus(documents.take(train), documents.take(sorted(chosen)))


def _cut(documents: Documents, valid_one_in: int) -> Corpus:
    """One document: its last part is for validation, from the first line that starts there if one does."""
    text, name = documents[0], documents.names[0]
    place = len(text) - max(1, len(text) // valid_one_in)
    line = text.find("\n", place) + 1
    place = line if 0 < line < len(text) else place
    if not 0 < place < len(text):
        raise ValueError(f"corpus: its only document {name!r} ({len(text)} characters) is too short to cut in two")
    return Corpus(Documents.of([text[:place]], [f"{name}, head"]), Documents.of([text[place:]], [f"{name}, tail"]))


def _stdlib(spec: CorpusSpec) -> Documents:
    root = Path(sysconfig.get_path("stdlib"))
    kept = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in STDLIB_SKIPS]
        kept += [Path(folder, name) for name in files if name.endswith(".py")]
    # _sysconfigdata describes how this interpreter was built.
    kept = [path for path in kept if not path.name.startswith("_sysconfigdata") and path.stat().st_size]
    if not kept:
        raise ValueError(f"corpus 'stdlib': this interpreter has no Python sources under {root}")
    kept.sort(key=lambda path: path.relative_to(root).as_posix())
    return Documents([path.relative_to(root).as_posix() for path in kept], lambda i: _source(kept[i]))


def _source(path: Path) -> str:
    """A Python source in the encoding that it declares (PEP 263)."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
    return path.read_bytes().decode(encoding)


def _text(spec: CorpusSpec) -> Documents:
    named: list[tuple[str, Piece]] = []
    for name, path in _files(spec, "*"):
        if spec.separator is None:
            named.append((name, Piece(path, 0, None, str(path))))
        else:
            named += [(f"{name}:{i}", piece) for i, piece in enumerate(_parts(path, spec.separator.encode()))]
    return Documents([name for name, _ in named], lambda i: _decode(named[i][1], spec.errors))


def _parts(path: Path, separator: bytes) -> Iterator[Piece]:
    start = 0
    for part in path.read_bytes().split(separator):
        if part:
            yield Piece(path, start, start + len(part), f"{path}, byte {start}")
        start += len(part) + len(separator)


def _jsonl(spec: CorpusSpec) -> Documents:
    named: list[tuple[str, Piece]] = []
    for name, path in _files(spec, "*.jsonl"):
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    named.append((f"{name}:{number}", Piece(path, start, start + len(line), f"{path}, line {number}")))
                start += len(line)
    return Documents([name for name, _ in named], lambda i: _field(named[i][1], spec))


def _field(piece: Piece, spec: CorpusSpec) -> str:
    try:
        row = json.loads(_decode(piece, spec.errors))
    except json.JSONDecodeError as error:
        raise ValueError(f"{piece.where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(row, dict) or spec.field not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f"{piece.where}: no field {spec.field!r}; the line has {has or 'no fields'}")
    if not isinstance(row[spec.field], str):
        raise ValueError(f"{piece.where}: field {spec.field!r} is a {type(row[spec.field]).__name__}, not a string")
    try:  # JSON can spell half of a surrogate pair, which no UTF-8 text holds
        return row[spec.field].encode("utf-8", spec.errors).decode()
    except UnicodeEncodeError:
        message = f"{piece.where}: field {spec.field!r} holds a lone surrogate; errors: replace accepts such text"
        raise ValueError(message) from None


def _decode(piece: Piece, errors: str) -> str:
    try:
        return piece.read().decode("utf-8", errors)
    except UnicodeDecodeError as error:
        message = f"{piece.where}: byte {piece.start + error.start} is not UTF-8; errors: replace accepts such text"
        raise ValueError(message) from None


def _files(spec: CorpusSpec, pattern: str) -> list[tuple[str, Path]]:
    """(name, path), sorted by name: relative to the folder, or to what stands before a glob's first wildcard."""
    given = Path(str(spec.path)).expanduser()
    if given.is_file():
        return [(given.name, given)]
    if given.is_dir():
        root, found = given, list(given.rglob(pattern))
    else:
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        found = [Path(match) for match in glob.glob(str(given), recursive=True)]
    named = [(path.relative_to(root).as_posix(), path) for path in found if path.is_file()]
    kept = sorted((name, path) for name, path in named if not any(part.startswith(".") for part in Path(name).parts))
    if not kept:
        raise ValueError(f"corpus path {str(spec.path)!r}: no such file, folder with {pattern} files, or glob match")
    return kept


NAMES = ("mara", "odin", "lena", "tovi", "ruth", "amos", "ines", "bela")
ADJECTIVES = ("red", "old", "quiet", "heavy", "round", "bright", "hollow", "distant")
NOUNS = ("stone", "river", "lamp", "garden", "letter", "engine", "window", "bridge")
VERBS = ("carry", "watch", "paint", "follow", "forget", "repair", "measure", "borrow")
SENTENCES = (
    "{a} and {b} {v} the {j} {n}.",
    "the {j} {n} belongs to {a}.",
    "{a} has {d} {n}s and {b} has {e}.",
    "why do {a} and {b} {v} every {n}?",
    "no {n} is as {j} as the {m} of {b}.",
    "if the {n} is {j}, {a} will {v} it.",
)


def _generated(spec: CorpusSpec) -> Documents:
    names = [f"generated/{spec.seed}/{i:06d}" for i in range(spec.documents)]
    return Documents(names, lambda i: _tale(Draws("tale", spec.seed, i), spec.document_bytes))


def _tale(draws: Draws, size: int) -> str:
    """ASCII sentences of at least `size` bytes in all; two names are fixed for the document, so memory pays."""
    first = draws.below(len(NAMES))
    a, b = NAMES[first], NAMES[first - 1 - draws.below(len(NAMES) - 1)]
    lines: list[str] = []
    while sum(map(len, lines)) + len(lines) < size:
        words = {"v": VERBS, "j": ADJECTIVES, "n": NOUNS, "m": NOUNS, "d": "23456789", "e": "23456789"}
        filled = {slot: _skewed(draws, choices) for slot, choices in words.items()}
        lines.append(_skewed(draws, SENTENCES).format(a=a, b=b, **filled))
    return "\n".join(lines) + "\n"


def _skewed(draws: Draws, choices: Sequence[str]) -> str:
    """Earlier choices are likelier (the smaller of two uniform draws)."""
    return choices[min(draws.below(len(choices)), draws.below(len(choices)))]
