"""Vocabularies that are trained: each cut against its definition, computed by hand from the vocabulary alone."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.cli.main import main
from assay.data.bpe import byte_symbols, words
from assay.data.corpora import Corpus, CorpusSpec, Documents, open_corpus
from assay.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer
from assay.data.vocabularies import CONTINUES, END_OF_TEXT, LONGEST, UNKNOWN
from assay.data.vocabulary_table import compare, misspelt

CORPUS = open_corpus(CorpusSpec(kind="generated", documents=12, document_bytes=800))
SIZES = {"bpe": 400, "wordpiece": 600, "unigram": 300, "word": 60, "word_bytes": 300}
SYMBOLS = byte_symbols()


def made(kind: str, vocab: int | None = None) -> Tokenizer:
    return build_tokenizer(TokenizerSpec(kind=kind, vocab=vocab or SIZES[kind]), CORPUS)  # type: ignore[arg-type]


MADE = {kind: made(kind) for kind in SIZES}
TEXTS = st.text(st.sampled_from(list("maredins. ?\n éa数")), max_size=30)


def spelt(word: str) -> str:
    return "".join(SYMBOLS[b] for b in word.encode())


@pytest.mark.parametrize("kind", SIZES)
def test_ids_and_specials(kind: str) -> None:
    ours = MADE[kind]
    assert ours.vocab_size == SIZES[kind] and ours.eos_id == 0 and ours.token_bytes[0] == b""
    if kind != "unigram":  # whose probabilities are sums in no fixed order
        assert ours.digest == made(kind).digest
    assert ours.hf.token_to_id(END_OF_TEXT) not in ours.encode(f"a {END_OF_TEXT}")


@given(TEXTS)
def test_wordpiece_takes_the_longest_piece(text: str) -> None:
    ours = MADE["wordpiece"]
    vocab = ours.hf.get_vocab()
    expected = []
    for word in words(text):
        rest, before = spelt(word), ""
        while rest:
            length = next(n for n in range(len(rest), 0, -1) if before + rest[:n] in vocab)
            expected.append(vocab[before + rest[:length]])
            rest, before = rest[length:], CONTINUES
    assert ours.encode(text).tolist() == expected


@given(TEXTS)
def test_unigram_takes_the_likeliest_cut(text: str) -> None:
    """Viterbi's answer against all cuts of each word (of those of up to ten bytes)."""
    ours = MADE["unigram"]
    scores = dict(json.loads(ours.hf.to_str())["model"]["vocab"])
    pieces = [ours.hf.id_to_token(i) for i in ours.encode(text)]
    for word in words(text):
        symbols = spelt(word)
        mine: list[str] = []
        while sum(map(len, mine)) < len(symbols):
            mine.append(pieces.pop(0))
        assert "".join(mine) == symbols
        if len(symbols) <= 10:
            assert math.isclose(sum(scores[piece] for piece in mine), best(symbols, scores), rel_tol=1e-9)
    assert not pieces


def best(symbols: str, scores: dict[str, float]) -> float:
    found = -math.inf
    for count in range(len(symbols)):
        for cuts in itertools.combinations(range(1, len(symbols)), count):
            ends = [0, *cuts, len(symbols)]
            parts = [symbols[a:b] for a, b in itertools.pairwise(ends)]
            found = max(found, sum(scores.get(part, -math.inf) for part in parts))
    return found


def test_words_are_the_most_frequent_ones_and_others_are_unknown() -> None:
    ours = MADE["word"]
    counts = Counter(spelt(word) for text in CORPUS.train for word in words(text))
    least = sorted(counts.values(), reverse=True)[SIZES["word"] - 3]
    known = set(ours.hf.get_vocab()) - {END_OF_TEXT, UNKNOWN}
    assert len(known) == SIZES["word"] - 2 and all(counts[word] >= least for word in known)
    unknown = ours.special("unk_token")
    some = next(word for word in words(CORPUS.train[0]) if word[0] == " " and spelt(word) in known)
    text = f"qwertz{some}"
    ids = ours.encode(text).tolist()
    assert ids.count(unknown) == sum(spelt(word) not in known for word in words(text)) > 0
    assert ours.token_bytes[unknown or 0] == b"" and unknown is not None
    assert ours.decode(ids) == some


@given(TEXTS)
def test_words_that_are_not_in_the_vocabulary_are_spelled(text: str) -> None:
    ours = MADE["word_bytes"]
    vocab = ours.hf.get_vocab()
    pieces = [[spelt(word)] if spelt(word) in vocab else list(spelt(word)) for word in words(text)]
    assert ours.encode(text).tolist() == [vocab[piece] for found in pieces for piece in found]
    held = {piece for piece in vocab if len(piece) > 1 and piece != END_OF_TEXT}
    assert len(held) == SIZES["word_bytes"] - 257 and held <= made("word", 70).hf.get_vocab().keys()


def test_words_of_any_length_and_any_byte_come_back_from_wordpiece() -> None:
    text = "x" * (3 * LONGEST + 7) + " " + "é" * LONGEST + " \x00\x1f\x7f" + "\U0010ffff"
    assert MADE["wordpiece"].decode(MADE["wordpiece"].encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "vocab", "message"),
    [
        ("wordpiece", 512, "a wordpiece tokenizer needs 513 or more"),
        ("unigram", 256, "a unigram tokenizer needs 257 or more"),
        ("word", 2, "a word tokenizer needs 3 or more"),
        ("word", None, "vocab: None; a word tokenizer"),
        ("word", 10_000, "vocab: 10000; the corpus has words for"),
        ("wordpiece", 60_000, "vocab: 60000; the corpus has pairs for"),
        ("word_bytes", 10_000, "vocab: 10000; the corpus has words for"),
        ("unigram", 60_000, "vocab: 60000; the corpus has pieces for"),
    ],
)
def test_sizes_that_cannot_be_are_refused(kind: str, vocab: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(TokenizerSpec.model_validate({"kind": kind, "vocab": vocab}), CORPUS)


def test_the_table_counts_what_it_says() -> None:
    specs = [TokenizerSpec(kind="byte"), *(TokenizerSpec(kind=k, vocab=v) for k, v in SIZES.items())]  # type: ignore[arg-type]
    specs = [spec for spec in specs if spec.kind != "unigram"]
    rows = {row.kind: row for row in compare(CORPUS, specs)}
    text = "".join(CORPUS.valid)
    assert rows["byte"].bytes_per_token == 1.0 and rows["byte"].unknown == rows["bpe"].misspelt_unknown == 0.0
    for kind, ours in ((kind, MADE[kind]) for kind in rows if kind in MADE):
        count = sum(len(ours.encode(one)) for one in CORPUS.valid)
        assert rows[kind].bytes_per_token == pytest.approx(len(text.encode()) / count)
    known = set(MADE["word"].hf.get_vocab())
    all_words = [word for one in CORPUS.valid for word in words(one)]
    assert rows["word"].unknown == pytest.approx(sum(spelt(word) not in known for word in all_words) / len(all_words))
    assert rows["word"].misspelt_unknown > 0.9 and rows["word"].misspelt_tokens == 1.0
    assert rows["bpe"].misspelt_tokens > rows["bpe"].word_tokens


def test_a_misspelt_word_has_two_neighbours_changed() -> None:
    draws = random.Random(1)
    for number in range(200):
        word = "".join(draws.choice("abcde") for _ in range(draws.randint(4, 9)))
        wrong = misspelt(word, number)
        differ = [i for i in range(len(word)) if word[i] != wrong[i]]
        if len(set(word[1:-1])) > 1:
            assert len(differ) == 2 and differ[1] == differ[0] + 1 and differ[0] > 0 and differ[1] < len(word) - 1
            assert sorted(word) == sorted(wrong)
        else:
            assert wrong == word


def test_the_verb(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    for i, text in enumerate(CORPUS.train):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    assert main(["tokenizers", "--data", str(tmp_path), "--kinds", "byte,bpe", "--vocab", "300", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [row["vocab"] for row in json.loads(out[-1])["tokenizers"]] == [256, 300] and out[2].startswith(
        "| byte | 256"
    )
    assert main(["tokenizers", "--kinds", "sentences"]) == 2
    assert "kind" in capsys.readouterr().err


def test_an_empty_corpus_is_refused() -> None:
    nothing = Corpus(Documents.of([]), Documents.of([]))
    with pytest.raises(ValueError, match="word: the corpus has no documents"):
        build_tokenizer(TokenizerSpec(kind="word", vocab=5), nothing)
