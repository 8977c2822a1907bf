"""Replies that a grammar allows: which tokens may follow, from llguidance (derivatives of regular expressions and an
Earley parser over the tokenizer's trie).

A token is allowed when the text so far and its bytes are the beginning of a text that the grammar accepts. All work is
on the CPU and bounded by `GrammarLimits`; regexes are matched without backtracking.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.data.tokenizers import Tokenizer
from assay.engine.request import Grammar, GrammarLimits

# Space enough for any layout, and not for an endless one: a small model may never leave white space again.
NOTHING = "there is no text that it accepts and that this tokenizer can write"
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,20}", "lenient": False}


class Vocabulary:
    """A tokenizer as llguidance's TokenizerWrapper wants it: the bytes of each id, and which ids say nothing.

    Ids that end a text are among those: where a grammar is fulfilled is told by the id `size`, which no model has.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        texts = tokenizer.token_bytes[:size]
        silent = {i for i, text in enumerate(texts) if not text} | tokenizer.ends
        self.size = self.eos_token_id = size
        self.tokens = [*texts, *(b"" for _ in range(len(texts), size + 1))]
        self.special_token_ids = sorted({i for i in silent if i < size} | set(range(len(texts), size + 1)))
        self.texts = frozenset(text for i, text in enumerate(texts) if i not in silent)

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that is the only one possible: asked for where those are forced, and here none are."""
        return []

    def missing(self, chars: Iterable[str]) -> str | None:
        """A character that no sequence of these tokens is sure to write; None when there is none."""
        whole = all(_is_text(text) for text in self.texts)
        if not whole and not all(bytes([b]) in self.texts for b in range(0x80, 0xC0)):
            return "\N{REPLACEMENT CHARACTER}"
        return next((char for char in sorted(chars) if not self._writes(char)), None)

    def _writes(self, char: str) -> bool:
        text = char.encode("utf-8", "replace")
        return text in self.texts or all(bytes([b]) in self.texts for b in text)


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _following(matcher: Any, size: int) -> tuple[NDArray[np.uint8], bool]:
    """The ids that continue the text, a bit each, and whether it may end. ValueError when this takes too much work."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8).copy()
    if matcher.is_error():
        raise ValueError(_reason(matcher.get_error()))
    at, bit = divmod(size, 8)
    fulfilled = bool(bits[at] >> bit & 1)
    bits[at] &= ~np.uint8(1 << bit)
    return bits, fulfilled


class Follower:
    """One reply on its way through a grammar. ends: the ids that may end it once the grammar is fulfilled."""

    def __init__(self, matcher: Any, ends: frozenset[int], size: int) -> None:
        self._matcher, self._ends, self._size = matcher, ends, size

    @property
    def done(self) -> bool:
        """The grammar is fulfilled and lets no text follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self, may_end: bool = True) -> NDArray[np.uint8]:
        """The ids that may follow, a bit each, the lowest first: ceil(V / 8) bytes. may_end: False leaves out the ends
        where anything else may follow.

        ValueError when nothing may, or the work exceeds its limits.
        """
        try:
            bits, fulfilled = _following(self._matcher, self._size)
        except ValueError as error:
            raise ValueError(f"grammar: {error}") from None
        if fulfilled and (may_end or not bits.any()):
            for end in self._ends:
                bits[end // 8] |= 1 << end % 8
        if not bits.any():
            raise ValueError(
                f"grammar: {'nothing but its end may follow, for which no token is given' if fulfilled else NOTHING}"
            )
        return bits[: -(-self._size // 8)]

    def take(self, token: int) -> None:
        if token not in self._ends:
            self._matcher.consume_token(token)

    def fork(self) -> Follower:
        return Follower(self._matcher.deep_copy(), self._ends, self._size)


class Grammars:
    """Compiled grammars of one tokenizer; the last ones used are kept. `size`: the width of the model's logits. Any
    thread may call it."""

    def __init__(self, tokenizer: Tokenizer, size: int, limits: GrammarLimits) -> None:
        self._tokenizer, self._size, self.limits = tokenizer, size, limits
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._compiled)

    def __contains__(self, grammar: Grammar) -> bool:
        return _name(grammar) in self._compiled

    def start(self, grammar: Grammar, ends: frozenset[int]) -> Follower:
        """A reply's way through a grammar. ValueError for one that is too large, means nothing, or allows nothing."""
        matcher = self.keep(grammar)
        inside = frozenset(end for end in ends if end < self._size)
        return Follower(matcher, inside, self._size)

    def keep(self, grammar: Grammar) -> Any:
        """Compile it, unless it is kept already; a copy of what it was compiled to. ValueError as `start`."""
        name = _name(grammar)
        with self._lock:
            kept = self._compiled.get(name)
        made = self._compile(grammar) if kept is None else kept
        with self._lock:
            self._compiled[name] = made
            self._compiled.move_to_end(name)
            while len(self._compiled) > self.limits.kept:
                self._compiled.popitem(last=False)
            return made.deep_copy()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._tokenizer, self._size)

    @cached_property
    def _trie(self) -> Any:
        guide = _llguidance()
        return guide.LLTokenizer(guide.TokenizerWrapper(self._vocabulary), n_vocab=self._size + 1)

    def _compile(self, grammar: Grammar) -> Any:
        kind, source = _source(grammar)
        if len(source) > self.limits.max_chars:
            raise ValueError(f"grammar.{kind}: {len(source)} characters; accepted: up to {self.limits.max_chars}")
        self._writable(grammar, source)
        guide, limits = _llguidance(), self.limits
        matcher = guide.LLMatcher(
            self._trie,
            written(grammar),
            log_level=0,
            limits=guide.LLParserLimits(
                initial_lexer_fuel=limits.compile_fuel,
                step_lexer_fuel=limits.step_fuel,
                max_lexer_states=limits.states,
                verbose_errors=False,
            ),
        )
        try:
            bits, fulfilled = _following(matcher.deep_copy(), self._size)
        except ValueError as error:
            raise ValueError(f"grammar.{kind}: {error}") from None
        if not fulfilled and not bits.any():
            raise ValueError(f"grammar.{kind}: {NOTHING}")
        return matcher

    def _writable(self, grammar: Grammar, source: str) -> None:
        chars = set(source) if grammar.choice else {*string.printable[:95], *(c for c in source if c > "\x7f")}
        missing = self._vocabulary.missing(chars)
        if missing is not None:
            raise ValueError(
                f"grammar: this tokenizer cannot write {missing!r} wherever it is asked to; "
                "accepted: a tokenizer that has every byte, or a choice of texts in its own characters"
            )


def is_grammars(why: str) -> bool:
    """Whether a reply ended for a reason of its grammar: the fault of who asked, and not of the engine."""
    return why.startswith("grammar")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError("grammar: constrained replies need llguidance: pip install 'assay[serve]'") from None
    return llguidance


def _source(grammar: Grammar) -> tuple[str, str]:
    """Which field is given, and all the text in it."""
    if grammar.json_schema is not None:
        return "json_schema", grammar.json_schema
    if grammar.regex is not None:
        return "regex", grammar.regex
    return ("choice", "".join(grammar.choice)) if grammar.choice else ("json_object", "")


def _name(grammar: Grammar) -> str:
    return hashlib.sha256(grammar.model_dump_json().encode()).hexdigest()


def written(grammar: Grammar) -> str:
    """The grammar in llguidance's variant of Lark's notation. no_forcing: a text that is the only one possible may be
    cut into tokens in any way, so that what is allowed is a matter of the grammar alone."""
    if grammar.regex is not None or grammar.choice:
        regex = grammar.regex or "|".join(map(_literal, grammar.choice))
        rule = json.loads(_llguidance().LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"]
    else:
        schema = json.loads(grammar.json_schema or '{"type": "object"}')
        rule = f"start: %json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS}, ensure_ascii=False)}"
    return f'%llguidance {{"no_forcing": true}}\n{rule}'


def _literal(text: str) -> str:
    """A regex for exactly this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _reason(error: str) -> str:
    """The line of an error message that says what is wrong."""
    found = re.search(r"^error: (.*)$", error, re.MULTILINE)
    return (found.group(1) if found else error.strip().partition("\n")[0])[:200]
