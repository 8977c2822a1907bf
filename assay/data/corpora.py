"""Corpora: documents with names, split once and for all into training and validation by a hash of the name."""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from assay.data.cleaning import CleanSpec, cleaned
from assay.data.documents import Documents as Documents
from assay.data.documents import Piece, files
from assay.data.draws import Draws
from assay.data.hub import HubSpec
from assay.data.jsonl import json_lines
from assay.spec.base import Spec

Kind = Literal["stdlib", "text", "jsonl", "parquet", "warc", "hub", "generated", "mixture", "store"]

# Folders of the standard library that are left out: installed packages, tests (among them files that are invalid
# on purpose), and the codec tables, which are generated data and not text.
STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"})

USED_FIELDS: Mapping[str, frozenset[str]] = {
    "stdlib": frozenset(),
    "text": frozenset({"path", "separator", "errors"}),
    "jsonl": frozenset({"path", "field", "errors"}),
    "parquet": frozenset({"path", "field", "errors"}),
    "warc": frozenset({"path", "errors"}),
    "hub": frozenset({"path", "field", "errors", "hub", "documents"}),
    "mixture": frozenset({"parts"}),
    "store": frozenset({"path"}),
    "generated": frozenset({"seed", "documents", "document_bytes"}),
}


ANYWHERE = frozenset({"kind", "valid_one_in", "clean"})


class CorpusSpec(Spec):
    """Which documents, and which of them are for validation.

    stdlib     the Python sources of the running interpreter's standard library: needs no download
    text       UTF-8 files at `path` (a file, a folder or a glob): a document a file, or more with `separator`
    jsonl      files of one JSON object a line; the document is the object's `field`
    parquet    files of rows; the document is the row's `field`
    warc       Common Crawl's files, packed or not: the plain text of WET, or the pages of WARC without their tags
    hub        the first `documents` rows of a dataset of the Hugging Face hub (`path` is owner/name, or a folder of
               such files), streamed once and kept; `hub` says which of its configurations and splits
    generated  sentences of a small seeded grammar, the same on every machine and interpreter
    mixture    `parts`, each a corpus with a weight: its share of the rows that are trained on
    store      tokens in the parts of `path`, any folder that fsspec reaches, streamed (`assay.data.store`)

    A document is for validation when sha256(name) % valid_one_in == 0. Where that leaves a side empty, one document
    is moved; a corpus of one document is cut near its end. `valid_one_in: 0` keeps everything for training. In a
    mixture each part is split by itself. clean: what is left out, before the split.
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
    hub: HubSpec = HubSpec()
    clean: CleanSpec = CleanSpec()
    parts: tuple[MixturePart, ...] = ()

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        unused = self.model_fields_set - USED_FIELDS[self.kind] - ANYWHERE
        changed = sorted(name for name in unused if getattr(self, name) != type(self).model_fields[name].default)
        if changed:
            accepted = ", ".join(sorted(USED_FIELDS[self.kind] | ANYWHERE - {"kind"}))
            raise ValueError(f"corpus kind {self.kind!r} does not use {', '.join(changed)}; it uses {accepted}")
        if "path" in USED_FIELDS[self.kind] and not self.path:
            raise ValueError(f"corpus kind {self.kind!r} needs path: a file, a folder or a glob")
        if self.valid_one_in == 1:
            raise ValueError("valid_one_in: 1 leaves nothing to train on; accepted: 0 (no validation), 2 or more")
        if self.kind == "mixture" and len(self.parts) < 2:
            raise ValueError(
                f"parts: {len(self.parts)} of them; accepted: two or more, each with a weight and a corpus"
            )
        if self.kind == "mixture" and self.clean != CleanSpec():
            raise ValueError("clean: the parts of a mixture are cleaned one by one: say it in parts.N.corpus.clean")
        if self.kind == "store" and (self.clean != CleanSpec() or self.valid_one_in != 10):
            raise ValueError("clean, valid_one_in: a store was cleaned and split when it was written: leave them out")
        if self.kind == "mixture" and self.valid_one_in != type(self).model_fields["valid_one_in"].default:
            raise ValueError(f"valid_one_in: {self.valid_one_in}; the parts of a mixture say theirs: leave it out")
        return self


class MixturePart(Spec):
    """A corpus, and the share of rows that comes from it: its weight over the sum of all."""

    weight: float = Field(gt=0.0)
    corpus: CorpusSpec

    @model_validator(mode="after")
    def _no_mixture(self) -> Self:
        if self.corpus.kind == "mixture":
            raise ValueError("corpus.kind: mixture; accepted in a mixture: any other kind")
        return self


CorpusSpec.model_rebuild()


@dataclass(frozen=True)
class Corpus:
    """Two lists of documents that have none in common."""

    train: Documents
    valid: Documents
    parts: tuple[tuple[float, int], ...] = ()
    """Of a mixture: the weight of each part, and how many training documents are its own, in their order."""

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.train.digest} {self.valid.digest}".encode()).hexdigest()


def open_corpus(spec: CorpusSpec) -> Corpus:
    """The documents of a spec, split. ValueError where there are none, or (on reading) for one that is not text."""
    if spec.kind == "mixture":
        return _mixture(spec)
    openers = {"stdlib": _stdlib, "text": _text, "jsonl": _jsonl, "generated": _generated}
    documents = openers.get(spec.kind, _elsewhere)(spec)
    if not len(documents):
        raise ValueError(f"corpus {spec.path or spec.kind!r} holds no documents")
    return split(cleaned(documents, spec.clean), spec.valid_one_in)


def _mixture(spec: CorpusSpec) -> Corpus:
    """The parts one after another, their documents' names behind their numbers."""
    opened = [open_corpus(part.corpus) for part in spec.parts]
    train, valid = (
        [Documents([f"{i}/{name}" for name in side.names], side.__getitem__) for i, side in enumerate(sides)]
        for sides in ([corpus.train for corpus in opened], [corpus.valid for corpus in opened])
    )
    parts = tuple((part.weight, len(side)) for part, side in zip(spec.parts, train, strict=True))
    return Corpus(Documents.joined(train), Documents.joined(valid), parts)


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
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in STDLIB_SKIPS]
        kept += [Path(folder, name) for name in names if name.endswith(".py")]
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
    for name, path in files(str(spec.path), "*"):
        if spec.separator is None:
            named.append((name, Piece(path, 0, None, str(path))))
        else:
            named += [(f"{name}:{i}", piece) for i, piece in enumerate(_parts(path, spec.separator.encode()))]
    return Documents([name for name, _ in named], lambda i: named[i][1].text(spec.errors))


def _parts(path: Path, separator: bytes) -> Iterator[Piece]:
    start = 0
    for part in path.read_bytes().split(separator):
        if part:
            yield Piece(path, start, start + len(part), f"{path}, byte {start}")
        start += len(part) + len(separator)


def _jsonl(spec: CorpusSpec) -> Documents:
    return json_lines(files(str(spec.path), "*.jsonl"), spec.field, spec.errors)


def _elsewhere(spec: CorpusSpec) -> Documents:
    """Formats that a library reads."""
    path = str(spec.path)
    if spec.kind == "parquet":
        from assay.data.parquet import rows

        return rows(files(path, "*.parquet"), spec.field, spec.errors)
    if spec.kind == "warc":
        from assay.data.warc import records

        return records(files(path, "*.warc", "*.warc.gz", "*.warc.wet", "*.warc.wet.gz"), spec.errors)
    from assay.data.hub import fetched

    return fetched(path, spec.hub, spec.field, spec.documents, spec.errors)


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
