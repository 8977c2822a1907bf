"""The openai package against the server: what its users write works as it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.live import NAME, Live

openai: Any = pytest.importorskip("openai", reason="openai is not installed: pip install openai")

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_and_completions(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    ask = {"model": NAME, "prompt": "once", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**ask)
    streamed = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text == "".join(c.text for e in streamed for c in e.choices)
    assert streamed[-1].usage == whole.usage and whole.usage.completion_tokens <= 12
    assert len(whole.choices[0].logprobs.token_logprobs) == len(whole.choices[0].logprobs.tokens) > 0


def test_chat_whole_and_streamed(client: Any) -> None:
    ask = {"model": NAME, "messages": HI, "max_tokens": 12, "temperature": 0.7, "seed": 2, "n": 2}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
    texts = ["", ""]
    for event in client.chat.completions.create(**ask, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [c.message.content for c in whole.choices] == texts
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for c in whole.choices for one in c.logprobs.content)


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_kept(client: Any, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
    ask = {"model": NAME, "messages": HI, "max_tokens": 300, "seed": seed, "response_format": form}
    made = client.chat.completions.create(**ask).choices[0]
    value = json.loads(made.message.content)
    assert made.finish_reason == "stop" and set(value) == {"a", "b"}
    assert 0 <= value["a"] <= 99 and isinstance(value["a"], int) and value["b"] in ("x", "y")


def test_patterns_choices_and_objects(client: Any) -> None:
    def text(**extra: Any) -> str:
        return str(client.completions.create(model=NAME, prompt="a", max_tokens=200, seed=4, **extra).choices[0].text)

    assert re.fullmatch(r"[a-c]{3}-\d+", text(extra_body={"guided_regex": r"[a-c]{3}-\d{1,4}"}))
    assert text(extra_body={"guided_choice": ["yes", "no"]}) in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_has_to_be_made(client: Any, choice: Any) -> None:
    ask = {"model": NAME, "messages": HI, "tools": [TOOL], "tool_choice": choice, "max_tokens": 300, "seed": 6}
    made = client.chat.completions.create(**ask).choices[0]
    assert made.finish_reason == "tool_calls" and made.message.content is None
    (call,) = made.message.tool_calls
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a", "b"}
    pieces = [c.delta for e in client.chat.completions.create(**ask, stream=True) for c in e.choices]
    (streamed,) = [one for piece in pieces for one in piece.tool_calls or ()]
    assert (streamed.index, streamed.function.name) == (0, "add")
    assert streamed.function.arguments == call.function.arguments
    assert not "".join(piece.content or "" for piece in pieces)


def test_calls_that_a_reply_makes_by_itself() -> None:
    """Text around two calls, one of them to a tool that nobody offered, which stays text."""
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 7, "b": "é<b>"}}\n</tool_call>'
    other = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
    with Live() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        server.force(f"I will. {call}{other}")
        ask = {"model": NAME, "messages": HI, "tools": [TOOL], "max_tokens": 400}
        made = client.chat.completions.create(**ask, tool_choice="auto").choices[0]
        assert made.finish_reason == "tool_calls" and made.message.content == f"I will. {other}"
        (found,) = made.message.tool_calls
        assert found.function.name == "add" and json.loads(found.function.arguments) == {"a": 7, "b": "é<b>"}
        deltas = [c.delta for e in client.chat.completions.create(**ask, stream=True) for c in e.choices]
        assert "".join(delta.content or "" for delta in deltas) == made.message.content
        (streamed,) = [one.function for delta in deltas for one in delta.tool_calls or ()]
        assert (streamed.name, streamed.arguments) == (found.function.name, found.function.arguments)
        plain = client.chat.completions.create(**ask, tool_choice="none").choices[0]
        assert plain.message.content == f"I will. {call}{other}" and plain.finish_reason == "stop"


def test_a_call_and_its_answer_go_back_into_the_conversation(client: Any, live: Live) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": "3"}]
    made = client.chat.completions.create(model=NAME, messages=messages, tools=[TOOL], max_tokens=3)
    count = live.ok("/tokenize", {"messages": messages})["count"]
    assert made.usage.prompt_tokens > count > len("add")


def test_refusals_are_the_clients_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model=NAME, messages=HI, temperature=-1)
    assert found.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert found.value.code == "model_not_found"
