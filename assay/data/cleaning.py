"""What is left out of a corpus before it is split: near duplicates, and pages that are no prose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from assay.data.documents import Documents
from assay.spec.base import Spec

SHINGLE = 5
"""Words that follow one another: documents are as alike as the sets of these (Lee et al. 2022, arXiv 2107.06499)."""

PERMUTATIONS = 128
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})


class CleanSpec(Spec):
    """duplicates: of documents whose sets of five-word runs have at least this Jaccard similarity, the first stays; 1
    takes out equal sets; null: all stay. quality: `gopher` keeps what passes the rules of Rae et al. 2021 (arXiv
    2112.11446, table A1), which are for English prose. min_chars: shorter documents are left out."""

    duplicates: float | None = Field(default=None, ge=0.1, le=1.0)
    quality: Literal["none", "gopher"] = "none"
    min_chars: int = Field(default=0, ge=0)


def cleaned(documents: Documents, spec: CleanSpec) -> Documents:
    """The documents that stay, in their order. ValueError where none does."""
    kept = [
        i
        for i, text in enumerate(documents if spec != CleanSpec() else ())
        if len(text) >= spec.min_chars and (spec.quality == "none" or is_prose(text))
    ]
    if spec == CleanSpec():
        return documents
    if spec.duplicates is not None:
        left = documents.take(kept)
        kept = [kept[i] for i in distinct(left, spec.duplicates)]
    if not kept:
        raise ValueError(f"clean: none of {len(documents)} documents is left")
    return documents.take(kept)


def shingles(text: str) -> frozenset[str]:
    """The runs of five words of a text, in lower case; of a shorter one the whole."""
    words = text.lower().split()
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def distinct(documents: Documents, threshold: float) -> Iterator[int]:
    """The places of documents that no earlier one that stays is so much alike.

    MinHash with banded hashing (Broder 1997; datasketch) names candidates, and their sets are compared: a document is
    never taken out for a likeness that it has not, and may stay although it has it where no band agrees.
    """
    from datasketch import MinHash, MinHashLSH

    # Weights of false and missed candidates: the false ones cost a comparison only.
    index = MinHashLSH(threshold=min(threshold, 0.99), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
    for i, text in enumerate(documents):
        mine = shingles(text)
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([one.encode() for one in sorted(mine)])
        if any(_alike(mine, shingles(documents[j])) >= threshold for j in sorted(index.query(sketch))):
            continue
        index.insert(i, sketch)
        yield i


def _alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def is_prose(text: str) -> bool:
    """The rules of Rae et al. 2021, table A1, but for those on repetition."""
    words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
    count = len(words)
    if not 50 <= count <= 100_000:
        return False
    symbols = text.count("#") + text.count("...") + text.count("\u2026")
    bullets = sum(line.startswith(("-", "*", "\u2022")) for line in lines)
    trailing = sum(line.endswith(("...", "\u2026")) for line in lines)
    letters = sum(any(char.isalpha() for char in word) for word in words)
    return (
        3 <= sum(map(len, words)) / count <= 10
        and symbols <= 0.1 * count
        and bullets <= 0.9 * len(lines)
        and trailing <= 0.3 * len(lines)
        and letters >= 0.8 * count
        and len(STOP_WORDS & {word.lower() for word in words}) >= 2
    )
