"""Calls of tools in a reply: which way of writing them a chat template knows, and reading them back as text comes.

hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number, text between them (Qwen, Hermes)
llama3   the whole reply is {"name": ..., "parameters": {...}}, several with `;` between; or after <|python_tag|>
mistral  [TOOL_CALLS] and a list of {"name": ..., "arguments": {...}}, or name[ARGS]{...} (Mistral)

What does not parse stays text, and so does what a template of another kind teaches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from assay.data.tokenizers import Tokenizer
from assay.engine.template import render
from assay.engine.text import overlap


@dataclass(frozen=True)
class Call:
    """arguments: the JSON text of an object."""

    name: str
    arguments: str


Found = list[str | Call]


class Reader:
    """Finds the calls in a reply. What `push` and `finish` return, in order, is the reply: text, and calls.

    names: the tools that were offered; a call of another stays text. null: any name is taken.
    silent: ids of markers that are special tokens, which say nothing in a reply's text.
    """

    form: ClassVar[str]
    opens: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()  # markers inside a call

    def __init__(self, names: Collection[str] | None = None, silent: Mapping[int, str] | None = None) -> None:
        self._names, self._silent = names, dict(silent or {})
        self._held, self._inside = "", False
        self._begun, self._called = False, False  # something was said; the last thing was a call

    def push(self, text: str, token: int | None = None) -> Found:
        """What has become certain with a piece of text. token: the id that it came with, for markers without text."""
        self._held += text + (self._silent.get(token, "") if token is not None else "")
        return self._advance(False)

    def finish(self) -> Found:
        """The rest, once no more text comes."""
        return self._advance(True)

    def _advance(self, last: bool) -> Found:
        found: Found = []
        while True:
            if not self._inside and not self._open(found, last):
                return found
            done = self._read(self._held, last)
            if done is None:
                return found
            self._inside, (made, self._held) = False, done
            self._called = isinstance(made[-1], Call) if made else self._called
            self._begun = True
            found += made

    def _open(self, found: Found, last: bool) -> bool:
        """Go on to the next beginning of a call; text before it is certain. Space after a call is no text."""
        if self._called:
            self._held = self._held.lstrip()
        at = self._held.find(self.opens)
        keep = 0 if last else overlap(self._held, self.opens)
        text = self._held[:at] if at >= 0 else self._held[: len(self._held) - keep]
        self._held = self._held[at + len(self.opens) :] if at >= 0 else self._held[len(text) :]
        if text:
            found.append(text)
            self._begun, self._called = True, False
        self._inside = at >= 0
        return self._inside

    def _read(self, text: str, last: bool) -> tuple[Found, str] | None:
        """What the text after a beginning is, and what is left of it; None: more is needed to say."""
        raise NotImplementedError

    def _raw(self, text: str) -> Found:
        """Text after a beginning that turned out to be no call: as it was said, without what was silent."""
        text = text if self.opens in self._silent.values() else self.opens + text
        return [text] if text else []

    def _call(self, value: Any, key: str = "arguments") -> Call | None:
        if not isinstance(value, dict) or not isinstance(value.get(key), dict):
            return None
        name = value.get("name")
        if not isinstance(name, str) or (self._names is not None and name not in self._names):
            return None
        return Call(name, json.dumps(value[key], ensure_ascii=False))


class Hermes(Reader):
    form = "hermes"
    opens = "<tool_call>"
    also = ("</tool_call>",)
    _tried = 0  # where to look on: before it each marker stands inside an argument, and is not tried again

    def _read(self, text: str, last: bool) -> tuple[Found, str] | None:
        close = self.also[0]
        at = text.find(close, self._tried)
        while at >= 0:
            try:
                call = self._call(_json(text[:at]))
            except ValueError as error:
                if "Unterminated string" in str(error):  # the marker stands inside an argument
                    self._tried = at + 1
                    at = text.find(close, self._tried)
                    continue
                call = None
            self._tried = 0
            end = "" if close in self._silent.values() else close
            return [call] if call else self._raw(text[:at] + end), text[at + len(close) :]
        if not last:
            self._tried = max(self._tried, len(text) - len(close) + 1)
            return None
        try:
            call = self._call(_json(text))  # a reply may end without the marker
        except ValueError:
            call = None
        return ([call] if call else self._raw(text)), ""


class Mistral(Reader):
    form = "mistral"
    opens = "[TOOL_CALLS]"
    also = ("[ARGS]", "[CALL_ID]")
    named: ClassVar[re.Pattern[str]] = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")

    def _read(self, text: str, last: bool) -> tuple[Found, str] | None:
        head = self.named.match(text)
        start = head.end() if head else len(text) - len(text.lstrip())
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return (self._raw(text), "") if last else None
        if head:
            value = [{"name": head.group(1), "arguments": value}]
        calls = [self._call(item) for item in value] if isinstance(value, list) else []
        good: Found = [call for call in calls if call is not None]
        return (good if good and len(good) == len(calls) else self._raw(text[:end])), text[end:]


class Llama3(Reader):
    form = "llama3"
    opens = "<|python_tag|>"
    between: ClassVar[re.Pattern[str]] = re.compile(r"\s*;?\s*")
    _bare = False  # the reply began with an object, without a marker

    def _open(self, found: Found, last: bool) -> bool:
        start = self._held.lstrip()
        if not self._begun and start.startswith("{"):
            self._inside = self._bare = True
            return True
        self._bare = False
        return (bool(start) or self._begun or last) and super()._open(found, last)

    def _read(self, text: str, last: bool) -> tuple[Found, str] | None:
        if not last:
            return None
        calls: Found = []
        at = len(text) - len(text.lstrip())
        while at < len(text):
            try:
                value, end = _DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                value, end = None, len(text)
            call = self._call(value, "parameters") or self._call(value)
            if call is None:
                return ([text] if self._bare else self._raw(text)), ""
            calls.append(call)
            after = self.between.match(text, end)
            at = after.end() if after else end
        return (calls or self._raw(text)), ""


READERS: Mapping[str, type[Reader]] = {made.form: made for made in (Hermes, Mistral, Llama3)}


def call_form(template: str, tokenizer: Tokenizer) -> str | None:
    """The way of writing calls that reads back what the template itself writes; None: it writes none, or another way.

    The names are those of this file's first lines.
    """
    call = Call("probe_tool", '{"city": "Paris"}')
    function = {"name": call.name, "arguments": call.arguments}
    told = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "probe0001", "type": "function", "function": function}],
    }
    try:
        text = render(template, [{"role": "user", "content": "Hello"}, told], tokenizer)
    except ValueError:
        return None
    if call.name not in text:
        return None
    for form in ("hermes", "mistral"):
        reader = READERS[form]()
        if [one for one in reader.push(text) + reader.finish() if isinstance(one, Call)] == [call]:
            return form
    start = text.rfind("{", 0, text.index(call.name))
    try:
        value, _ = _DECODER.raw_decode(text, max(start, 0))
    except ValueError:
        return None
    return "llama3" if value == {"name": call.name, "parameters": json.loads(call.arguments)} else None


def call_reader(form: str, tokenizer: Tokenizer, names: Collection[str] | None = None) -> Reader:
    """A reader for one reply. ValueError for an unknown form."""
    if form not in READERS:
        raise ValueError(f"calls of tools in the form {form!r}; accepted: {', '.join(READERS)}")
    kind = READERS[form]
    added = tokenizer.hf.get_added_tokens_decoder()
    markers = {kind.opens, *kind.also}
    return kind(names, {i: token.content for i, token in added.items() if token.special and token.content in markers})


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _json(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
