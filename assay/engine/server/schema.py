"""The bodies that clients send. An unknown field, a value of another type: refused by name.

null stands for a field that was left out, as in OpenAI's API. Classes group the fields that the two bodies share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WrapValidator, field_validator

from assay.spec.base import Spec

Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Id = Annotated[int, Field(ge=0)]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]], Field(max_length=1024)]


def _encodable(value: Any) -> Any:
    """JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in it; accepted: whole characters") from None
    return value


def _accepts(what: str) -> WrapValidator:
    """One message where none of the members of a union fits."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError(f"accepted: {what}") from None

    return WrapValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
Json = Annotated[dict[str, Any], AfterValidator(_encodable)]
SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})


class Body(Spec):
    """Base of all bodies: no "1" for 1."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None


class Drawing(Body):
    """How tokens are drawn; see SamplingParams."""

    temperature: Annotated[float, Field(ge=0.0)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    logit_bias: Biases | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit()):
                raise ValueError(f"{key!r} is not a token id; accepted: ids as keys, biases from -100 to 100 as values")
        return value


class ResponseFormat(Body):
    """text; json_object: any JSON object; json_schema: JSON that a schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[Json | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _of_its_type(cls, value: Json | None, info: Any) -> Json | None:
        kind = info.data.get("type")
        if (value is not None) != (kind == "json_schema"):
            raise ValueError(f"goes with type json_schema, and type is {kind}")
        if value is not None and (strange := sorted(set(value) - SCHEMA_KEYS)):
            raise ValueError(f"unknown field {strange[0]!r}; accepted: {', '.join(sorted(SCHEMA_KEYS))}")
        if value is not None and not isinstance(value.get("schema"), dict):
            raise ValueError("schema: expected an object, a JSON schema")
        return value


class Bounds(Drawing):
    """How long a reply may be, what ends it, and what form it must have."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Text | list[Text] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and "" in ([value] if isinstance(value, str) else value):
            raise ValueError("an empty text would end every reply at once")
        return value

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("accepted with `stream: true` alone")
        return value

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def choices(self) -> int:
        return self.n or 1


Prompt = Annotated[
    Text | list[Text] | list[Id] | list[list[Id]],
    _accepts("a text, a list of texts, a list of token ids, or a list of such lists; all of whole characters"),
]


class CompletionBody(Bounds):
    """POST /v1/completions. max_tokens: 16 where it is left out, as in OpenAI's API."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None


class Part(Body):
    """One part of a message; others than text (images, sound) are not understood."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Text | list[Part], _accepts('a text, or a list of {"type": "text", "text": ...}; all of whole characters')
]


class CalledFunction(Body):
    name: Text
    arguments: Text


class Call(Body):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation. tool_calls: what an assistant asked for; tool_call_id: what a tool answers."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Text | None = None

    @field_validator("tool_calls")
    @classmethod
    def _of_an_assistant(cls, value: list[Call] | None, info: Any) -> list[Call] | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("accepted in messages of the assistant alone")
        return value

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Bounds):
    """POST /v1/chat/completions. Without max_tokens a reply may be as long as the context allows."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("accepted with `logprobs: true` alone")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _of_the_tools(cls, value: Any, info: Any) -> Any:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise ValueError(f"{value.function.name!r} is not among the tools: {', '.join(names) or 'there are none'}")
        if value == "required" and not names:
            raise ValueError("required: there are no tools")
        return value


class TokenizeBody(Body):
    """POST /tokenize: the ids of a text, after what a text begins with, or of a conversation."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize: the text of ids."""

    model: str | None = None
    tokens: list[Id]
