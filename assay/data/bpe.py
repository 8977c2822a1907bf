"""Byte-pair encoding, written to be read: the oracle that trained tokenizers are compared with.

Sennrich, Haddow, Birch 2016, arXiv 1508.07909, over bytes (Radford et al. 2019, "GPT-2"): a text is cut into words,
a word is a sequence of bytes, and the most frequent pair of neighbouring tokens becomes a token, again and again.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Pair = tuple[bytes, bytes]

# Unicode's White_Space property; str.isspace also accepts the separators U+001C to U+001F, which are not in it.
WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(c) for c in range(0x2000, 0x200B)
}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_symbols() -> tuple[str, ...]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves, and the other 68 for U+0100 onwards, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(others)) for b in range(256))


def _class(char: str) -> str:
    if char in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "other")


def words(text: str) -> Iterator[str]:
    r"""GPT-2's cut: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    start = 0
    while start < len(text):
        stop = _word_end(text, start)
        yield text[start:stop]
        start = stop


def _word_end(text: str, start: int) -> int:
    for suffix in CONTRACTIONS:
        if text.startswith(suffix, start):
            return start + len(suffix)
    first = start + (text[start] == " " and start + 1 < len(text) and text[start + 1] not in WHITE_SPACE)
    stop = first
    while stop < len(text) and _class(text[stop]) == _class(text[first]):
        stop += 1
    # A run of white space gives its last character up to the word that follows it.
    gives = _class(text[first]) == "space" and stop < len(text) and stop - first > 1
    return stop - gives


def train(texts: Iterable[str], merges: int) -> list[Pair]:
    """The first `merges` merges; among equally frequent pairs, the one whose tokens were made first (bytes first).

    Bytes stand in the order of their printable symbols, which is the order of ids in the `tokenizers` library.
    """
    counts = Counter(word for text in texts for word in words(text))
    pieces = {word: [bytes([b]) for b in word.encode()] for word in counts}
    symbols = byte_symbols()
    age = {bytes([b]): i for i, b in enumerate(sorted(range(256), key=symbols.__getitem__))}
    found: list[Pair] = []
    while len(found) < merges:
        pairs: Counter[Pair] = Counter()
        for word, tokens in pieces.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        found.append(best)
        age.setdefault(best[0] + best[1], len(age))
        pieces = {word: _merged(tokens, best) for word, tokens in pieces.items()}
    return found


def encode(text: str, merges: Sequence[Pair]) -> list[bytes]:
    """Tokens of a text: in each word the earliest merge that applies is applied everywhere, until none applies."""
    rank = {pair: i for i, pair in enumerate(merges)}
    return [token for word in words(text) for token in _encode_word(word, rank)]


def _encode_word(word: str, rank: dict[Pair, int]) -> list[bytes]:
    tokens = [bytes([b]) for b in word.encode()]
    while pairs := [pair for pair in pairwise(tokens) if pair in rank]:
        tokens = _merged(tokens, min(pairs, key=rank.__getitem__))
    return tokens


def _merged(tokens: list[bytes], pair: Pair) -> list[bytes]:
    out: list[bytes] = []
    i = 0
    while i < len(tokens):
        together = tuple(tokens[i : i + 2]) == pair
        out.append(pair[0] + pair[1] if together else tokens[i])
        i += 1 + together
    return out
