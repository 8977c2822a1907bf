"""Tokenizers side by side on one corpus: how short they make its text, what they do not know, how fast they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from assay.data.bpe import words
from assay.data.corpora import Corpus
from assay.data.draws import Draws
from assay.data.tokenizers import TokenizerSpec, build_tokenizer

LETTERS = 4
"""Words from so many letters on are misspelt: their ends stay, and two neighbours between them change places."""
MOST = 2000


@dataclass(frozen=True)
class Compared:
    """One tokenizer on the validation documents of a corpus, or on its training documents where it has no others.

    bytes_per_token: UTF-8 bytes of the text over its tokens. unknown: the share of tokens that say that something is
    not known. word_tokens, misspelt_tokens: the mean number of tokens of words from four letters on, each with the
    space before it, and of the same words misspelt; misspelt_unknown: the share of these that hold an unknown token.
    train_s: seconds to make it. encode_byte_s: bytes of text a second.
    """

    kind: str
    vocab: int
    bytes_per_token: float
    unknown: float
    word_tokens: float
    misspelt_tokens: float
    misspelt_unknown: float
    train_s: float
    encode_byte_s: float


def compare(corpus: Corpus, specs: Sequence[TokenizerSpec]) -> list[Compared]:
    """One row for each spec. ValueError for a tokenizer that cannot be made of the corpus, or cannot read its text."""
    return [_row(corpus, spec) for spec in specs]


def _row(corpus: Corpus, spec: TokenizerSpec) -> Compared:
    begun = time.perf_counter()
    made = build_tokenizer(spec, corpus)
    trained = time.perf_counter() - begun
    texts = list(corpus.valid if len(corpus.valid) else corpus.train)
    size = sum(len(text.encode()) for text in texts)
    begun = time.perf_counter()
    ids = [made.encode(text) for text in texts]
    seconds = time.perf_counter() - begun
    tokens, unknown = sum(map(len, ids)), made.special("unk_token")
    strange = 0 if unknown is None else sum(int((found == unknown).sum()) for found in ids)
    right = list(_words(texts))
    wrong = [misspelt(word, i) for i, word in enumerate(right)]
    before, after = ([made.encode(" " + word).tolist() for word in some] for some in (right, wrong))
    return Compared(
        spec.kind,
        made.vocab_size,
        size / max(tokens, 1),
        strange / max(tokens, 1),
        _mean([len(found) for found in before]),
        _mean([len(found) for found in after]),
        _mean([unknown in found for found in after]) if unknown is not None else 0.0,
        trained,
        size / seconds,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _words(texts: Sequence[str]) -> Iterator[str]:
    """The first distinct words of enough letters, in the order of the text."""
    found = dict.fromkeys(word.strip() for text in texts for word in words(text))
    long = (word for word in found if len(word) >= LETTERS and word.isalpha() and misspelt(word, 0) != word)
    return (word for _, word in zip(range(MOST), long, strict=False))


def misspelt(word: str, number: int) -> str:
    """Two neighbouring letters inside the word change places; where they are equal, the next two that differ."""
    inside = range(1, len(word) - 2)
    first = Draws("misspelt", number).below(len(inside))
    for at in [*inside[first:], *inside[:first]]:
        if word[at] != word[at + 1]:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word
