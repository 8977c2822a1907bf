"""Grammars: what may follow against brute force, and replies of a model that draws at random, which always parse."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from assay.data.corpora import CorpusSpec, open_corpus
from assay.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer
from assay.engine.chooser import Chooser, Unchoosable
from assay.engine.grammar import Follower, Grammars
from assay.engine.request import Grammar, GrammarLimits, Request, SamplingParams

LIMITS = GrammarLimits()


def pieces(texts: list[str], special: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """A vocabulary of these pieces as SentencePiece writes them (a space is U+2581, <0x41> a byte)."""
    made = hf.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(name) for name in special])
    return Tokenizer(made, {"eos_token": special[0]} if special else {})


ALPHABET = ["a", "b", "ab", "ba", "aab", "c", "▁", "<0x61>", "bc▁", "é", "<0xC3>", "<0xA9>"]


@cache
def small(extra: tuple[str, ...] = ()) -> Tokenizer:
    """A dozen tokens: of several letters, two for one text, half characters; and every other byte."""
    rest = [f"<0x{b:02X}>" for b in range(256) if b not in (0x61, 0xC3, 0xA9)]
    return pieces([*ALPHABET, *extra, *rest])


@cache
def tokenizer(kind: str) -> Tokenizer:
    corpus = open_corpus(CorpusSpec(kind="generated"))
    if kind == "pieces":
        return small()
    return build_tokenizer(TokenizerSpec(kind=kind, vocab=300 if kind == "bpe" else None), corpus)  # type: ignore[arg-type]


def ids(follower: Follower, size: int) -> set[int]:
    return set(np.nonzero(np.unpackbits(follower.allowed(), bitorder="little")[:size])[0].tolist())


@cache
def beginnings(regex: str) -> frozenset[bytes]:
    """Every beginning of every text of up to six of a, b, c, space and é that matches: by trying them all."""
    texts = ("".join(chars) for n in range(7) for chars in itertools.product("abc é", repeat=n))
    whole = [text.encode() for text in texts if re.fullmatch(regex, text)]
    return frozenset(text[:n] for text in whole for n in range(len(text) + 1))


def matches(regex: str, said: bytes) -> bool:
    try:
        return re.fullmatch(regex, said.decode()) is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("regex", ["(ab|ba)*c?", "a{2,4}b?", "[^c]{1,3}", "é|a é", "(a|ab)(bc|c) "])
def test_allowed_tokens_are_those_of_brute_force(regex: str) -> None:
    """Along every reply of up to two tokens; the end is allowed exactly where the regex matches."""
    text, ends = small(), small().ends
    table, size = text.token_bytes, text.vocab_size + 3
    letters = {i for i, piece in enumerate(table) if piece and set(piece) <= set("abc é".encode())}

    def walk(follower: Follower, said: bytes, depth: int) -> None:
        found = ids(follower, size)
        assert found & letters == {i for i in letters if said + table[i] in beginnings(regex)}, said
        assert (ends <= found) == matches(regex, said)
        assert all(i in ends or (i < len(table) and table[i]) for i in found)
        for token in found & letters if depth else ():
            after = follower.fork()
            after.take(token)
            if not after.done:
                walk(after, said + table[token], depth - 1)

    walk(Grammars(text, size, LIMITS).start(Grammar(regex=regex), ends), b"", 2)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["a", 'é\n"', 7, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "size": {"type": "integer", "minimum": -12, "maximum": 250},
    },
    "required": ["name", "kind", "tags", "size"],
    "additionalProperties": False,
}


def fits(text: str) -> bool:
    """The schema above, read by hand."""
    value = json.loads(text)
    return (
        list(value) == ["name", "kind", "tags", "size"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and value["kind"] in ("a", 'é\n"', 7, None)
        and len(value["tags"]) <= 3
        and all(isinstance(tag, bool) for tag in value["tags"])
        and type(value["size"]) is int
        and -12 <= value["size"] <= 250
    )


CHOICES = ("yes", "yes!", "no\n", 'a "b" \\ /', "ünïcode 漢字", "\x01\x7f{}|")


def cases() -> Iterator[tuple[Grammar, Any]]:
    yield Grammar(json_schema=json.dumps(SCHEMA)), fits
    yield Grammar(regex=r"([0-9]{1,3}-){2}[a-fé漢]+!"), re.compile(r"([0-9]{1,3}-){2}[a-fé漢]+!").fullmatch
    yield Grammar(choice=CHOICES), CHOICES.__contains__
    yield Grammar(json_object=True), lambda text: isinstance(json.loads(text), dict)


def random_replies(some: Chooser, text: Tokenizer, asked: list[Request], seed: int) -> list[bytes | None]:
    """What a model with random logits says; None for a reply that was cut off. A dead end would raise."""
    made = torch.Generator().manual_seed(seed)
    said: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    live = list(said)
    for i in live:
        some.enter(i, asked[i])
    for _ in range(asked[0].max_new):
        chosen = some.choose(live, 2 * torch.randn(len(live), some.vocab, generator=made)) if live else []
        for i, each in zip(list(live), chosen):
            if each.token not in asked[i].stop_tokens:
                said[i].append(each.token)
            if each.last or each.token in asked[i].stop_tokens:
                live.remove(i)
    for i in said:
        some.leave(i)
    return [None if i in live else text.decode_bytes(ids) for i, ids in said.items()]


@cache
def chooser(kind: str) -> Chooser:
    """Its model has more ids than the tokenizer."""
    return Chooser(tokenizer(kind).vocab_size + 5, tokenizer(kind), "cpu")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kind", ["byte", "bpe", "pieces"])
def test_replies_of_random_models_always_parse(kind: str, number: int) -> None:
    """204 seeds over all grammars and tokenizers, half without a token for the end; the bounded grammars always come
    to an end."""
    text, (grammar, holds) = tokenizer(kind), list(cases())[number]
    asked = [
        Request(
            prompt=(1,),
            grammar=grammar,
            stop_tokens=text.ends if seed % 2 else frozenset(),
            max_new=100 if number == 3 else 250,
            sampling=SamplingParams(seed=seed),
        )
        for seed in range(17)
    ]
    said = random_replies(chooser(kind), text, asked, number)
    ended = [reply.decode() for reply in said if reply is not None]
    assert all(holds(reply) for reply in ended), ended
    assert len(ended) == 17 if number in (0, 2) else ended


@given(
    texts=st.sets(
        st.text(st.characters(min_codepoint=1, codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=4
    ),
    seed=st.integers(0, 9),
)
def test_a_choice_is_one_of_its_texts(texts: set[str], seed: int) -> None:
    text = tokenizer("byte")
    asked = Request(prompt=(1,), grammar=Grammar(choice=tuple(texts)), stop_tokens=text.ends, max_new=26)
    (said,) = random_replies(chooser("byte"), text, [asked], seed)
    assert said is not None and said.decode() in texts


def test_an_id_that_ends_a_text_is_none_of_its_bytes() -> None:
    """A byte tokenizer's 0 ends, whatever stop tokens a request has; ids that the tokenizer lacks never follow."""
    follower = Grammars(tokenizer("byte"), 300, LIMITS).start(Grammar(regex="[^a]b"), frozenset())
    found = ids(follower, 300)
    assert found == {b for b in range(256) if b not in (0, ord("a")) and (b < 0x80 or 0xC2 <= b <= 0xF4)}


def test_rows_with_and_without_a_grammar_share_a_batch() -> None:
    text = tokenizer("byte")
    some, made = Chooser(256, text, "cpu"), torch.zeros(3, 256)
    made[:, ord("z")], made[:, ord("b")] = 5.0, 1.0
    greedy = SamplingParams(temperature=0.0)
    some.enter("free", Request(prompt=(1,), sampling=greedy))
    some.enter("bound", Request(prompt=(1,), sampling=greedy, grammar=Grammar(regex="[a-c]{2}")))
    some.enter("end", Request(prompt=(1,), sampling=greedy, stop_tokens=text.ends, grammar=Grammar(regex="b?")))
    first = some.choose(["free", "bound", "end"], made)
    assert [(bytes([c.token]), c.last) for c in first] == [(b"z", False), (b"b", False), (b"b", True)]
    some.fork("bound", "fork", 1)
    second = some.choose(["fork", "bound", "end"], made)
    assert [(c.token, c.last) for c in second] == [(ord("b"), True), (ord("b"), True), (0, True)]
    with pytest.raises(Unchoosable, match="nothing but its end may follow") as caught:
        some.choose(["free", "fork", "bound"], made)
    assert list(caught.value.why) == ["fork", "bound"]


def test_min_new_holds_the_end_back_while_something_else_may_follow() -> None:
    text = tokenizer("byte")
    some, made = Chooser(256, text, "cpu"), torch.zeros(1, 256)
    made[0, 0] = 9.0
    greedy = SamplingParams(temperature=0.0)
    for regex, count, expected in (("a*", 3, b"aaa\0"), ("a?", 3, b"a\0"), ("a*", 0, b"\0")):
        asked = Request(
            prompt=(1,), sampling=greedy, stop_tokens=text.ends, min_new=count, grammar=Grammar(regex=regex)
        )
        some.enter(regex, asked)
        assert bytes(some.choose([regex], made)[0].token for _ in expected) == expected
        some.leave(regex)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ({"regex": "(a"}, r"grammar\.regex: unclosed group"),
        ({"regex": r"a(?=b)"}, r"grammar\.regex: .*look-around"),
        ({"regex": r"[^\s\S]"}, r"grammar\.regex: "),
        ({"regex": "a" * 2001}, r"grammar\.regex: 2001 characters; accepted: up to 2000"),
        ({"choice": ["a" * 1500, "b" * 501]}, r"grammar\.choice: 2001 characters"),
        ({"json_schema": {"type": "foo"}}, r"grammar\.json_schema: .*foo"),
        ({"json_schema": {"not": {"type": "string"}}}, r"grammar\.json_schema: .*not"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, r"grammar\.json_schema: .*minimum"),
        ({"json_schema": {"$ref": "http://x.y/z"}}, r"grammar\.json_schema: "),
        ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, r"grammar\.json_schema: "),
    ],
)
def test_what_means_nothing_or_too_much_is_refused(grammar: dict[str, Any], says: str) -> None:
    some = Chooser(256, tokenizer("byte"), "cpu", GrammarLimits(max_chars=2000))
    with pytest.raises(ValueError, match=says) as caught:
        some.enter("a", Request(prompt=(1,), grammar=Grammar.model_validate(grammar)))
    assert "\n" not in str(caught.value)
    some.enter("a", Request(prompt=(1,), grammar=Grammar(regex="a")))


def test_the_work_is_bounded() -> None:
    """By fuel when it is compiled, and at every token: such a sequence is named, and the others go on."""
    text = tokenizer("byte")
    with pytest.raises(ValueError, match=r"grammar\.regex"):
        Grammars(text, 256, GrammarLimits(compile_fuel=1000)).start(Grammar(regex=r"\w{3000}"), text.ends)
    some, made = Chooser(256, text, "cpu", GrammarLimits(step_fuel=50)), torch.zeros(2, 256)
    made[:, ord("a")] = 1.0
    some.enter("deep", Request(prompt=(1,), grammar=Grammar(regex="(?:(?:a?){500}a{500})")))
    some.enter("plain", Request(prompt=(1,)))
    with pytest.raises(Unchoosable) as caught:
        for _ in range(50):
            some.choose(["deep", "plain"], made)
    assert list(caught.value.why) == ["deep"] and caught.value.why["deep"].startswith("grammar: ")
    assert some.choose(["plain"], made[:1])


def test_compiled_grammars_are_kept_up_to_a_number() -> None:
    text = tokenizer("byte")
    grammars = Grammars(text, 256, GrammarLimits(kept=2))
    for regex in ("a", "b", "a", "c", "a"):
        grammars.start(Grammar(regex=regex), text.ends).take(ord(regex))
        assert len(grammars) <= 2
    assert ids(grammars.start(Grammar(regex="a"), text.ends), 256) == {ord("a")}


def test_a_tokenizer_that_lacks_characters_is_refused_unless_none_of_them_is_asked_for() -> None:
    text = tokenizer("char")
    alphabet = {piece.decode() for piece in text.token_bytes if piece}
    grammars = Grammars(text, text.vocab_size, LIMITS)
    assert "{" not in alphabet
    for given_ in (Grammar(json_object=True), Grammar(regex="a"), Grammar(choice=("a", "{"))):
        with pytest.raises(ValueError, match="cannot write"):
            grammars.start(given_, text.ends)
    word = "".join(sorted(alphabet & set("abcdefgh")))[:3]
    follower = grammars.start(Grammar(choice=(word,)), text.ends)
    for char in word:
        (only,) = ids(follower, text.vocab_size)
        assert text.token_bytes[only].decode() == char
        follower.take(only)
    assert follower.done
    half = pieces([chr(c) for c in range(32, 127)] + ["<0xC3>", "<0xA9>"])
    with pytest.raises(ValueError, match="cannot write"):
        Grammars(half, half.vocab_size, LIMITS).start(Grammar(regex="a|é"), half.ends)
