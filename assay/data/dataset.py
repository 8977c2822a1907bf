"""What a run trains on: a corpus and a tokenizer, or the rows of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from assay.data.corpora import Corpus, CorpusSpec, open_corpus
from assay.data.documents import Documents
from assay.data.draws import permutation
from assay.data.loader import Batch, Loader, Source, Stream, windows
from assay.data.packing import BestFit, Blend, Epochs, Packing, Rowed, Rows
from assay.data.shards import Shard, default_cache, encode_documents, locked
from assay.data.store import StoredData
from assay.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer


class Data(Protocol):
    """What the training loop asks of its data. `digest` names the contents; `validates`: some are held out."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def digest(self) -> str: ...

    @property
    def validates(self) -> bool: ...

    def stream(self, rows: int, length: int, seed: int, mix: Sequence[tuple[Source, float]] = ()) -> Stream:
        """Batches to train on, of `rows` rows of `length` tokens."""

    def held_out(self, length: int, count: int) -> Batch:
        """At most `count` rows of `length` tokens that are never trained on: the same ones every time."""


@dataclass(frozen=True)
class Dataset:
    """Training and validation documents as ids; valid is None for a corpus without validation documents.

    packing, valid_packing: how documents become rows (`assay.data.packing`), of training and of validation. parts: of a
    mixture, the weight of each part and how many of the training documents are its own, in their order. unique: rows
    are cut from so many tokens of the documents (`some`), again and again; null: from all.
    """

    train: Shard
    valid: Shard | None
    tokenizer: Tokenizer
    digest: str
    packing: Packing = "concatenate"
    parts: tuple[tuple[float, int], ...] = ()
    unique: int | None = None
    valid_packing: Packing = "concatenate"

    @property
    def validates(self) -> bool:
        return self.valid is not None

    def stream(self, rows: int, length: int, seed: int, mix: Sequence[tuple[Source, float]] = ()) -> Loader:
        """Rows of the training documents; mix: `assay.data.loader.Loader`."""
        if self.unique is not None:
            few = replace(self, train=some(self.train, self.unique), unique=None)
            if self.parts:
                raise ValueError("batch.epochs: a mixture repeats each part as its weight says: accepted: null")
            return few.stream(rows, length, seed, mix)
        if self.packing == "concatenate" and not self.parts:
            return Loader(self.train, rows, length, seed, mix)
        return Loader(self.train, rows, length, seed, mix, self._rows(length, seed))

    def _rows(self, length: int, seed: int) -> Rowed:
        made: type[Epochs] | type[BestFit] = BestFit if self.packing == "best_fit" else Epochs
        if not self.parts:
            return made(self.train, length, seed)
        ends = np.cumsum([count for _, count in self.parts]).tolist()
        own = [self.train.part(end - count, end) for end, (_, count) in zip(ends, self.parts, strict=True)]
        return Blend([made(shard, length, seed) for shard in own], [weight for weight, _ in self.parts], seed)

    def held_out(self, length: int, count: int) -> Batch:
        """Windows from all over the validation documents; whole ones, if they are packed by best fit."""
        assert self.valid is not None
        if self.valid_packing == "best_fit":
            whole = BestFit(self.valid, length, 0)
            return Batch.of(Rows.stack([whole.row(i) for i in range(min(count, whole.rows))]), self.valid.token_bytes)
        return windows(self.valid, length, count)


PASSAGE = 1024  # tokens: of one long document the shortest selections would hold nothing else


def some(shard: Shard, tokens: int) -> Shard:
    """So many tokens of a shard, in passages of at most 1,024 from all its documents, in an order drawn once and the
    last cut short: fewer are among more. ValueError where all documents together have less."""
    if tokens > len(shard.tokens):
        raise ValueError(f"batch.epochs: {tokens} tokens are to be read again; the documents have {len(shard.tokens)}")
    begins = np.concatenate([np.arange(a, b, PASSAGE) for a, b in pairwise(shard.offsets.tolist())])
    order = permutation(len(begins), "unique")
    lengths = np.diff(begins, append=len(shard.tokens))[order]
    ends = np.minimum(np.cumsum(lengths), tokens)
    taken = np.diff(ends, prepend=0)
    held = [shard.tokens[a : a + n].tolist() for a, n in zip(begins[order], taken, strict=True) if n]
    return Shard.of(held, shard.token_bytes.tolist())


def open_dataset(corpus: CorpusSpec, tokenizer: TokenizerSpec, cache: Path | None = None) -> Dataset | StoredData:
    """Open, tokenize and map a corpus; tokenizers and shards are kept in `cache` (default: the user's cache folder). A
    store is tokens already. ValueError there for a tokenizer that is made from text."""
    if corpus.kind == "store":
        if tokenizer.kind not in ("byte", "made"):
            raise ValueError(f"tokenizer.kind: {tokenizer.kind}; a store holds no text: accepted: byte, made")
        none = Documents.of([])
        return StoredData.open(str(corpus.path), build_tokenizer(tokenizer, Corpus(none, none)))
    folder = default_cache() if cache is None else cache
    opened = open_corpus(corpus)
    made = cached_tokenizer(tokenizer, opened, folder)
    valid = encode_documents(opened.valid, made, folder) if len(opened.valid) else None
    return Dataset(encode_documents(opened.train, made, folder), valid, made, opened.digest, parts=opened.parts)


def cached_tokenizer(spec: TokenizerSpec, corpus: Corpus, cache: Path) -> Tokenizer:
    """`build_tokenizer`, done once for a corpus."""
    if spec.kind in ("byte", "made"):
        return build_tokenizer(spec, corpus)
    key = hashlib.sha256(f"{spec.model_dump_json()} {corpus.digest}".encode()).hexdigest()[:32]
    folder = cache / f"tokenizer-{key}"
    if not (folder / "tokenizer.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"tokenizer-{key}.lock"):
            if not (folder / "tokenizer.json").exists():
                build_tokenizer(spec, corpus).save(folder)
    return Tokenizer.load(folder)
