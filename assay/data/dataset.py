"""A corpus and a tokenizer, ready to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from assay.data.corpora import Corpus, CorpusSpec, open_corpus
from assay.data.shards import Shard, default_cache, encode_documents, locked
from assay.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Training and validation documents as ids; valid is None for a corpus without validation documents."""

    train: Shard
    valid: Shard | None
    tokenizer: Tokenizer
    digest: str


def open_dataset(corpus: CorpusSpec, tokenizer: TokenizerSpec, cache: Path | None = None) -> Dataset:
    """Open, tokenize and map a corpus; tokenizers and shards are kept in `cache` (default: the user's cache folder)."""
    folder = default_cache() if cache is None else cache
    opened = open_corpus(corpus)
    made = cached_tokenizer(tokenizer, opened, folder)
    valid = encode_documents(opened.valid, made, folder) if len(opened.valid) else None
    return Dataset(encode_documents(opened.train, made, folder), valid, made, opened.digest)


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
