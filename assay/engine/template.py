"""Chat templates: a conversation to token ids, as the model's tokenizer_config.json says.

Templates come with checkpoints, so they run in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from assay.data.tokenizers import Tokenizer

# role: system, user, assistant or tool; content; and as in OpenAI's API tool_calls of the assistant, tool_call_id
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # as in OpenAI's API: {"type": "function", "function": {"name", "description", "parameters"}}


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The template of tokenizer_config.json; the one named `default` where there are several; None without one."""
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def render(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] | None = None
) -> str:
    """The text that asks for the next reply. ValueError for what the template refuses or attempts."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = _tojson
    given = {name: _content(value) for name, value in tokenizer.config.items() if name.endswith("_token")}
    given |= {"messages": [_parsed(m) for m in messages], "tools": [dict(t) for t in tools] if tools else None}
    try:
        return environment.from_string(template).render(add_generation_prompt=True, **given)
    except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"tokenizer_config.json: chat_template: {error}") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As transformers has it: jinja2's own would write < and & as HTML wants them, which no model was taught."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _parsed(message: Message) -> dict[str, Any]:
    """A message whose calls have their arguments as an object, which is what templates expect."""
    made = dict(message)
    if message.get("tool_calls"):
        made["tool_calls"] = [{**c, "function": _with_object(c["function"])} for c in message["tool_calls"]]
    return made


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"tool_calls: the arguments of {function['name']!r} are not the JSON text of an object")
    return {**function, "arguments": arguments}


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value


def encode(
    messages: Sequence[Message], template: str, tokenizer: Tokenizer, tools: Sequence[Tool] | None = None
) -> tuple[int, ...]:
    """Ids of the rendered conversation. Only the template's own special tokens become special ids.

    ValueError when a message of the user, or a tool, spells one; a reply that does (as ordinary tokens) loses it.
    """
    added = tokenizer.hf.get_added_tokens_decoder()
    names = {token.content for token in added.values() if token.special}
    parsed = [_parsed(message) for message in messages]
    for what, value in [("a tool", tools or ()), *(("the message", m) for m in parsed if m["role"] != "assistant")]:
        spelt = sorted(name for name in names if any(name in text for text in _texts(value)))
        if spelt:
            raise ValueError(f"{what} holds {spelt[0]!r}, which is a special token of this model")
    clean = [_mapped(message, lambda text: _without(text, names)) for message in parsed]
    return tuple(tokenizer.marked(render(template, clean, tokenizer, tools)).tolist())


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, Sequence) else value


def _without(text: str, names: Collection[str]) -> str:
    """A text that spells none of the names, not even once others are taken out of it."""
    while spelt := [name for name in names if name in text]:
        for name in spelt:
            text = text.replace(name, "")
    return text
