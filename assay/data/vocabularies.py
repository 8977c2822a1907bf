"""Vocabularies and how they are found in a text, each a `tokenizers.Tokenizer`.

All that are trained cut a text as GPT-2 does and spell a word in bytes, so they differ in the vocabulary and in how a
word is cut into it, and any text comes back; `word` alone has words that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from assay.data.bpe import byte_symbols

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
CONTINUES = "\u2581"  # before pieces inside a word; BERT's ## would be two bytes that a text may have
LONGEST = 100  # bytes of a word: longer ones are cut first


def from_bytes() -> hf.Tokenizer:
    """256 ids, each the byte of its number."""
    made = hf.Tokenizer(models.BPE(vocab={char: b for b, char in enumerate(byte_symbols())}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def from_chars(chars: Iterable[str]) -> hf.Tokenizer:
    """An id for each of these characters."""
    alphabet = sorted(chars)
    if not alphabet:
        raise ValueError("tokenizer kind char: the corpus has no characters")
    made = hf.Tokenizer(models.WordLevel({char: i for i, char in enumerate(alphabet)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END_OF_TEXT])
    return made


def _byte_level(model: models.Model) -> hf.Tokenizer:
    made = hf.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def bpe(texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """The most frequent pair of neighbours becomes a token, again and again (Sennrich 2016, arXiv 1508.07909)."""
    made = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def wordpiece(texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """A word is the longest piece that it begins with, and so on to its end (Schuster and Nakajima 2012; Wu et al.
    2016, arXiv 1609.08144, section 4.1). Pieces that begin a word and pieces inside one are different tokens; they are
    found as the library does, by the frequency of pairs."""
    symbols = sorted(byte_symbols())
    # All bytes of both kinds, in a fixed order: one that no word has inside would make a word unknown, and the library
    # orders what it finds by a table whose order is another one each time.
    single = [END_OF_TEXT, *symbols, *(CONTINUES + char for char in symbols)]
    made = _byte_level(models.WordPiece(continuing_subword_prefix=CONTINUES))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=single, continuing_subword_prefix=CONTINUES, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    kept = made.get_vocab()
    made = _byte_level(models.WordPiece(kept, max_input_chars_per_word=LONGEST, continuing_subword_prefix=CONTINUES))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [made.pre_tokenizer, pre_tokenizers.Split(hf.Regex(f".{{1,{LONGEST}}}"), "isolated")]
    )
    made.decoder = decoders.Sequence([decoders.Replace(CONTINUES, ""), decoders.ByteLevel()])
    made.add_special_tokens([END_OF_TEXT])
    return made


def unigram(texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """Tokens with probabilities: a word is cut as is likeliest, and of many tokens those stay without which the corpus
    would be less likely (Kudo 2018, arXiv 1804.10959, section 3.2). The library adds up in another order each time, so
    probabilities differ a little from one training to the next: keep what was made."""
    made = _byte_level(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_symbols()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    # Rounded, and in an order of their own: the library reads its own file back with other last digits.
    found = json.loads(made.to_str())["model"]["vocab"]
    special, rest = found[:1], sorted((-round(score, 6), piece) for piece, score in found[1:])
    ready = _byte_level(models.Unigram([(special[0][0], 0.0), *((piece, -cost) for cost, piece in rest)]))
    ready.add_special_tokens([END_OF_TEXT])
    return ready


def word(texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """The most frequent words, each with the space before it; all others are one token, `<|unknown|>`."""
    made = _byte_level(models.WordLevel(unk_token=UNKNOWN))
    trainer = trainers.WordLevelTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT, UNKNOWN], show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def word_bytes(texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """The most frequent words, each with the space before it; all others are spelled in bytes, so that any text comes
    back and its bits a byte compare with those of the other vocabularies."""
    found = word(texts, vocab + 2).get_vocab()
    symbols = sorted(byte_symbols())
    words = [piece for piece in sorted(found, key=found.__getitem__)[2:] if piece not in symbols]
    kept = [END_OF_TEXT, *symbols, *words][:vocab]
    # Without merges a word is one token where the vocabulary has it whole, and its bytes where it has not.
    made = _byte_level(models.BPE({piece: i for i, piece in enumerate(kept)}, [], ignore_merges=True))
    made.add_special_tokens([END_OF_TEXT])
    return made


BYTES_AND_END = 1 + 256
TRAINED: Mapping[str, tuple[Callable[[Iterable[str], int], hf.Tokenizer], int, str]] = {
    "bpe": (bpe, BYTES_AND_END, f"256 bytes and {END_OF_TEXT}"),
    "wordpiece": (wordpiece, BYTES_AND_END + 256, f"256 bytes that begin a word, 256 inside one, and {END_OF_TEXT}"),
    "unigram": (unigram, BYTES_AND_END, f"256 bytes and {END_OF_TEXT}"),
    "word": (word, 3, f"{END_OF_TEXT}, {UNKNOWN} and a word"),
    "word_bytes": (word_bytes, BYTES_AND_END, f"256 bytes and {END_OF_TEXT}"),
}
"""By kind: how it is trained, the fewest ids that it can have, and what these are."""


def train(kind: str, texts: Iterable[str], vocab: int) -> hf.Tokenizer:
    """A vocabulary of exactly `vocab` ids. ValueError for a corpus that has not so many."""
    given = iter(texts)
    first = next(given, None)
    if first is None:
        raise ValueError(f"tokenizer kind {kind}: the corpus has no documents")
    made = TRAINED[kind][0](chain([first], given), vocab)
    if made.get_vocab_size() < vocab:
        what = {"word": "words", "word_bytes": "words", "unigram": "pieces"}.get(kind, "pairs")
        raise ValueError(f"vocab: {vocab}; the corpus has {what} for {made.get_vocab_size()} ids only")
    return made
