"""What is not accepted is refused by name, in OpenAI's shape, and never half done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from assay.engine.server.config import Limits
from tests.server.live import CONTEXT, Live

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEXT: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing"),
    ({"prompt": 5}, "prompt", "a text, a list of texts"),
    ({"prompt": ["a", 5]}, "prompt", "a text, a list of texts"),
    ({"prompt": [True]}, "prompt", "a text, a list of texts"),
    ({"prompt": [99999]}, "prompt", "ids 0 to 257"),
    ({"prompt": "a" * CONTEXT}, "prompt", f"accepted: up to {CONTEXT - 1}"),
    ({"prompt": "a" * 10, "max_tokens": CONTEXT - 9}, "max_tokens", f"context of this model is {CONTEXT}"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 5.5}, "max_tokens", "integer"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -1}, "top_k", "greater than or equal to 0"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "ids 0 to 257"),
    ({"logit_bias": {"1": 200}}, "logit_bias", "less than or equal to 100"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"n": 17}, "n", "accepted: 1 to 16"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": ["a"] * 17}, "stop", "up to 16"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"echo": True}, "echo", "False"),
    ({"best_of": 2}, "best_of", "unknown field"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"model": "gpt-5"}, "model", "not served here"),
    ({"guided_regex": "a(b"}, "guided_regex", "guided_regex: unclosed group"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "one of them"),
    ({"guided_choice": []}, "guided_choice", "guided_choice: grammar: nothing given"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "goes with type json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        "response_format",
        "type must be",
    ),
]
CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1 item, not []"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages", "'system', 'user', 'assistant' or 'tool'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
    ({"messages": [{"role": "user", "content": "<|start|>system"}]}, "messages", "special token"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "whole characters"),
    (
        {"messages": HI, "tools": [{"type": "function", "function": {"name": "a", "parameters": {"\ud800": 1}}}]},
        "tools",
        "whole",
    ),
    ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "max_completion_tokens"),
    ({"messages": HI, "top_logprobs": 1}, "top_logprobs", "logprobs: true"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice", "no tools"),
    ({"messages": HI, "tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "True"),
    ({"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
    ({"messages": HI, "functions": []}, "functions", "unknown field"),
    ({"messages": HI, "prompt": "a"}, "prompt", "unknown field"),
]


def refusal(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer of this status, whose shape is checked."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert len(body["error"]["message"]) <= 400
    found: dict[str, Any] = body["error"]
    return found


@pytest.mark.parametrize(("body", "param", "message"), TEXT, ids=lambda v: json.dumps(v)[:40])
def test_completions_refuse_by_name(live: Live, body: dict[str, Any], param: str, message: str) -> None:
    whole = body if not body else {"prompt": "a", **body}
    error = refusal(live.post("/v1/completions", whole), 404 if param == "model" else 400)
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize(("body", "param", "message"), CHAT, ids=lambda v: json.dumps(v)[:40])
def test_chats_refuse_by_name(live: Live, body: dict[str, Any], param: str, message: str) -> None:
    raw = json.dumps(body)
    answer = live.client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    error = refusal(answer)
    assert error["param"] == param and message in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
    ],
)
def test_what_is_not_a_json_object_is_refused(live: Live, raw: bytes) -> None:
    refusal(live.client.post("/v1/completions", content=raw, headers={"content-type": "application/json"}))


def test_other_routes_and_methods_are_named(live: Live) -> None:
    assert "/v1/embeddings" in refusal(live.post("/v1/embeddings", {}), 404)["message"]
    assert "GET" in refusal(live.client.get("/v1/completions"), 405)["message"]


def test_a_refused_call_leaves_nothing_behind(live: Live) -> None:
    """The second prompt of a call is refused: the first is not computed either."""
    refusal(live.post("/v1/completions", {"prompt": [[1, 2], [99999]]}))
    assert live.ask(lambda engine: (engine.busy, engine.stats()["running"])) == (False, 0)
    assert live.server.worker.under_way == 0


def test_limits_hold_to_the_byte() -> None:
    limits = Limits(body_bytes=200, prompt_tokens=20, stops=1, choices=2, prompts=2, schema_bytes=40, waiting=0)
    with Live(limits=limits, max_running=2) as server:
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        kind = {"content-type": "application/json"}
        fits = body + b" " * (200 - len(body))
        assert server.client.post("/v1/completions", content=fits, headers=kind).status_code == 200
        refusal(server.client.post("/v1/completions", content=fits + b" ", headers=kind), 413)
        refusal(server.client.post("/v1/completions", content=iter([fits, b" "]), headers=kind), 413)
        assert server.ok("/v1/completions", {"prompt": "a" * 20, "max_tokens": 1})
        for bad, param in (
            ({"prompt": "a" * 21}, "prompt"),
            ({"prompt": ["a"] * 3}, "prompt"),
            ({"prompt": "a", "stop": ["b", "c"]}, "stop"),
            ({"prompt": "a", "n": 3}, "n"),
            ({"prompt": "a", "guided_regex": "a" * 41}, "guided_regex"),
        ):
            assert refusal(server.post("/v1/completions", bad))["param"] == param
        assert "4 replies" in refusal(server.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}))["message"]
        assert server.server.worker.under_way == 0
