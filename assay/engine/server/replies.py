"""What the engine said, as bodies: the pieces of a stream, and the whole that they make when put together.

A reply that is not streamed is made of the same pieces as one that is, so the two cannot differ.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from assay.data.tokenizers import Tokenizer
from assay.engine.grammar import is_grammars
from assay.engine.request import Request
from assay.engine.runner import Token
from assay.engine.server.errors import ApiError
from assay.engine.server.worker import Call, Said

Json = dict[str, Any]


class Writer(Protocol):
    """One choice as it grows."""

    def push(self, token: Token, counted: bool) -> list[Json]:
        """Pieces that are certain with this token. counted: it is part of the reply (a stop token is not)."""
        ...

    def whole(self, pieces: Sequence[Json]) -> Json:
        """The choice that these pieces make."""
        ...


@dataclass
class Names:
    """Tokens as texts: of one that is not whole characters, its bytes; of a special one, its name."""

    tokenizer: Tokenizer

    def text(self, token: int) -> str:
        made = self.tokenizer.token_bytes[token] if token < len(self.tokenizer.token_bytes) else b""
        if not made:
            return self.tokenizer.hf.id_to_token(token) or ""
        try:
            return made.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in made)

    def spelt(self, token: int, logprob: float | None) -> Json:
        """As chat completions tell a token."""
        made = self.tokenizer.token_bytes[token] if token < len(self.tokenizer.token_bytes) else b""
        return {"token": self.text(token), "logprob": bounded(logprob), "bytes": list(made) or None}


def bounded(logprob: float | None) -> float:
    """A logprob that JSON can say: a token that a grammar or a bias forced may have had none at all."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob


def check(token: Token, field: str | None) -> None:
    """ApiError where the engine gave the reply up; 400 where a grammar is why, which would fail again (clients ask
    again after a 500). field: the body's own that the grammar came from."""
    if token.finish == "error" and is_grammars(token.why):
        raise ApiError(400, f"{field}: this reply cannot go on: {token.why.partition(': ')[2]}", field)
    if token.finish in ("error", "cancelled", "deadline"):
        raise ApiError(500, f"the engine gave this reply up: {token.finish}")


class Text:
    """A choice of /v1/completions."""

    def __init__(self, names: Names, logprobs: int | None) -> None:
        self.names, self.logprobs, self.at = names, logprobs, 0

    def push(self, token: Token, counted: bool) -> list[Json]:
        finish = token.finish
        told = self._told(token, token.id) if self.logprobs is not None and counted and token.id is not None else None
        if not (token.text or told or finish):
            return []
        return [{"index": 0, "text": token.text, "logprobs": told, "finish_reason": finish}]

    def _told(self, token: Token, number: int) -> Json:
        name, at = self.names.text(number), self.at
        self.at += len(name)
        top = {self.names.text(i): bounded(value) for i, value in token.top}
        return {
            "tokens": [name],
            "token_logprobs": [bounded(token.logprob)],
            "top_logprobs": [{name: bounded(token.logprob), **top}],
            "text_offset": [at],
        }

    def whole(self, pieces: Sequence[Json]) -> Json:
        told = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
        keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        joined = {key: [item for one in told for item in one[key]] for key in keys}
        return {
            "index": 0,
            "text": "".join(piece["text"] for piece in pieces),
            "logprobs": None if self.logprobs is None else joined,
            "finish_reason": pieces[-1]["finish_reason"],
        }


@dataclass
class Usage:
    """Tokens of a call, as OpenAI counts them: a prompt once, whatever the number of its replies. more: what assay
    tells beside that of so many tokens."""

    prompt: int
    more: Callable[[int], Json]
    written: int = 0
    reused: dict[int, int] = field(default_factory=dict)

    def count(self, said: Said) -> None:
        self.written += said.token.id is not None
        if not said.token.choice:
            self.reused[said.index] = said.token.reused

    @property
    def cached(self) -> int:
        """Prompt tokens that were stored already, for the first reply of each prompt."""
        return sum(self.reused.values())

    @property
    def body(self) -> Json:
        total = self.prompt + self.written
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "assay": self.more(total),
        }


@dataclass
class Answer:
    """One call's answer, whole or in chunks. writers: one for each choice, those of the first prompt first. grammar:
    the body's own field that one came from."""

    kind: str  # the id's beginning
    objects: tuple[str, str]  # `object` of a whole answer, and of a chunk
    model: str
    writers: Sequence[Writer]
    usage: Usage
    grammar: str | None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, streamed: bool) -> Json:
        return {
            "id": f"{self.kind}-{self.id}",
            "object": self.objects[streamed],
            "created": self.created,
            "model": self.model,
        }

    def place(self, requests: Sequence[Request], said: Said) -> int:
        """Which choice of the answer speaks."""
        return said.index * requests[0].n + said.token.choice

    def pieces(self, call: Call, said: Said) -> Iterable[Json]:
        self.usage.count(said)
        check(said.token, self.grammar)
        at = self.place(call.requests, said)
        counted = said.token.id not in call.requests[said.index].stop_tokens
        return [{**piece, "index": at} for piece in self.writers[at].push(said.token, counted)]

    async def whole(self, call: Call) -> Json:
        found: list[list[Json]] = [[] for _ in self.writers]
        async for said in call:
            for piece in self.pieces(call, said):
                found[piece["index"]].append(piece)
        choices = [{**w.whole(made), "index": at} for at, (w, made) in enumerate(zip(self.writers, found, strict=True))]
        return {**self.head(False), "choices": choices, "usage": self.usage.body}
