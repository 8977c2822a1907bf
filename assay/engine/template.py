"""Chat templates: a conversation to token ids, as the model's tokenizer_config.json says.

Templates come with checkpoints, so they run in jinja2's sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from assay.data.tokenizers import Tokenizer

Message = Mapping[str, str]  # role: system, user or assistant; content


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The template of tokenizer_config.json; the one named `default` where there are several; None without one."""
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def render(template: str, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """The text that asks for the next reply. ValueError for what the template refuses or attempts."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    special = {name: _content(value) for name, value in tokenizer.config.items() if name.endswith("_token")}
    try:
        made = environment.from_string(template)
        return made.render(messages=[dict(m) for m in messages], add_generation_prompt=True, **special)
    except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"tokenizer_config.json: chat_template: {error}") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value


def encode(messages: Sequence[Message], template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the rendered conversation. Only the template's own special tokens become special ids.

    ValueError when a message of the user spells one; a reply that does (as ordinary tokens) loses it.
    """
    added = tokenizer.hf.get_added_tokens_decoder()
    ids = {token.content: i for i, token in added.items() if token.special}
    for message in messages:
        spelt = [name for name in ids if name in message["content"]]
        if spelt and message["role"] != "assistant":
            raise ValueError(f"the message holds {spelt[0]!r}, which is a special token of this model")
    text = render(template, [_without(m, ids) for m in messages], tokenizer)
    return encode_special(text, ids, tokenizer)


def _without(message: Message, names: Mapping[str, int]) -> Message:
    content = message["content"]
    for name in names:
        content = content.replace(name, "")
    return {**message, "content": content}


def encode_special(text: str, ids: Mapping[str, int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of a text in which the names of `ids` stand for these ids."""
    if not ids:
        return tuple(tokenizer.encode(text).tolist())
    made: list[int] = []
    for piece in re.split("(" + "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True)) + ")", text):
        if piece in ids:
            made.append(ids[piece])
        elif piece:
            made.extend(tokenizer.encode(piece).tolist())
    return tuple(made)
