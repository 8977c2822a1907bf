"""A choice of /v1/chat/completions: text as it comes, calls of tools where the reply makes some."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

from assay.engine.runner import Token
from assay.engine.server.replies import Json, Names
from assay.engine.tools import Reader


class Chat:
    """Implements Writer. reader: finds calls in the text; null where no tools were offered.

    forced: the whole reply is one call as JSON, which is told at its end.
    """

    def __init__(self, names: Names, logprobs: int | None, reader: Reader | None, forced: bool = False) -> None:
        self.names, self.logprobs, self.reader, self.forced = names, logprobs, reader, forced
        self.begun, self.called, self.held = False, 0, ""

    def push(self, token: Token, counted: bool) -> list[Json]:
        finish = token.finish
        deltas = self._deltas(token, finish is not None)
        if not self.begun:
            deltas.insert(0, {"role": "assistant", "content": ""})
            self.begun = True
        told = self._told(token) if self.logprobs is not None and counted and token.id is not None else None
        if not deltas and told is None and finish is None:
            return []
        deltas = deltas or [{}]
        pieces: list[Json] = [{"index": 0, "delta": d, "logprobs": None, "finish_reason": None} for d in deltas]
        pieces[-1]["logprobs"] = told
        pieces[-1]["finish_reason"] = "tool_calls" if finish == "stop" and self.called else finish
        return pieces

    def whole(self, pieces: Sequence[Json]) -> Json:
        content = "".join(piece["delta"].get("content") or "" for piece in pieces)
        calls = [call for piece in pieces for call in piece["delta"].get("tool_calls", ())]
        message: Json = {"role": "assistant", "content": content if content or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        told = [item for piece in pieces if piece["logprobs"] for item in piece["logprobs"]["content"]]
        return {
            "index": 0,
            "message": message,
            "logprobs": None if self.logprobs is None else {"content": told, "refusal": None},
            "finish_reason": pieces[-1]["finish_reason"],
        }

    def _deltas(self, token: Token, last: bool) -> list[Json]:
        text = token.text
        if self.forced:
            self.held += text
            return self._forced() if last else []
        if self.reader is None:
            return [{"content": text}] if text else []
        found = self.reader.push(text, token.id) + (self.reader.finish() if last else [])
        return [{"content": one} if isinstance(one, str) else self._call(one.name, one.arguments) for one in found]

    def _forced(self) -> list[Json]:
        """The call; what was cut off before it was one stays text."""
        try:
            call = json.loads(self.held)
            return [self._call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))]
        except (ValueError, KeyError, TypeError):
            return [{"content": self.held}]

    def _call(self, name: str, arguments: str) -> Json:
        at, self.called = self.called, self.called + 1
        ident = f"call_{uuid.uuid4().hex[:24]}"
        call = {"index": at, "id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"tool_calls": [call]}

    def _told(self, token: Token) -> Json:
        assert token.id is not None
        top = [self.names.spelt(i, value) for i, value in token.top]
        return {"content": [{**self.names.spelt(token.id, token.logprob), "top_logprobs": top}], "refusal": None}
