"""Chat templates: a conversation to token ids, as the model's tokenizer_config.json says.

Templates come with checkpoints, so they run in jinja2's sandbox.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    names = {token.content for token in added.values() if token.special}
    for message in messages:
        spelt = sorted(name for name in names if name in message["content"])
        if spelt and message["role"] != "assistant":
            raise ValueError(f"the message holds {spelt[0]!r}, which is a special token of this model")
    return tuple(tokenizer.marked(render(template, [_without(m, names) for m in messages], tokenizer)).tolist())


def _without(message: Message, names: Collection[str]) -> Message:
    """A message that spells none of the names, not even once others are taken out of it."""
    content = message["content"]
    while spelt := [name for name in names if name in content]:
        for name in spelt:
            content = content.replace(name, "")
    return {**message, "content": content}
