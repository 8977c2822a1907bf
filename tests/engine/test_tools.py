"""Calls of tools: what templates write is read back, however it is cut; what is no call stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from assay.data.tokenizers import Tokenizer
from assay.engine.template import encode, render
from assay.engine.tools import READERS, Call, Found, call_form, call_reader
from tests.engine.test_text import chatty, tokenizer

HEAD = "{%- for m in messages %}{{ '<|start|>' + m.role + '\\n' }}{%- if m.tool_calls %}{{ m.content }}"
TAIL = (
    "{%- else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)
HERMES = (
    "{%- if tools %}{{ '<|start|>system\\nTools:\\n' }}{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    '{{ \'Answer with <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|end|>\\n\' }}{% endif %}'
    + HEAD
    + "{%- for c in m.tool_calls %}{{ '<tool_call>\\n' + {'name': c.function.name, 'arguments': c.function.arguments}"
    " | tojson + '\\n</tool_call>' }}{{ '' if loop.last else '\\n' }}{% endfor %}" + TAIL
)
LLAMA3 = (
    HEAD + "{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{%- set f = m.tool_calls[0].function %}"
    '{{- \'{"name": "\' + f.name + \'", "parameters": \' + (f.arguments | tojson) + "}" }}' + TAIL
)
MISTRAL = (
    HEAD + "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{%- if c.id | length != 9 %}{{ raise_exception('id') }}"
    "{%- endif %}{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ '' if loop.last else ', ' }}"
    "{%- endfor %}{{ ']' }}" + TAIL
)
MISTRAL_NAMED = (
    HEAD
    + "{%- for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson)"
    " }}{% endfor %}" + TAIL
)
XML = HEAD + "{%- for c in m.tool_calls %}<tool_call><function={{ c.function.name }}></tool_call>{% endfor %}" + TAIL
DEAF = "{%- for m in messages %}{{ m.content }}{% endfor %}"
MINE = chatty()
FORMS = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES, "hermes"),
        (LLAMA3, "llama3"),
        (MISTRAL, "mistral"),
        (MISTRAL_NAMED, "mistral"),
        (XML, None),
        (DEAF, None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[1].tool_calls[0].function | tojson }}", None),
    ],
)
def test_the_form_is_what_the_template_writes(template: str, form: str | None) -> None:
    assert call_form(template, chatty(template)) == form


def joined(found: Found) -> Found:
    """Neighbouring texts as one."""
    made: Found = []
    for one in found:
        if isinstance(one, str) and made and isinstance(made[-1], str):
            made[-1] += one
        else:
            made.append(one)
    return made


def read(form: str, text: str, cuts: list[int] | None = None, names: list[str] | None = None) -> Found:
    reader, found, at = call_reader(form, MINE, names), [], 0
    for cut in [*sorted(c % (len(text) + 1) for c in cuts or ()), len(text)]:
        found += reader.push(text[at:cut])
        at = cut
    return joined([*found, *reader.finish()])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "]", "}", '"', "\\", "é<&>'"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments: Call(name, json.dumps(arguments, ensure_ascii=False)),
    st.sampled_from(["weather", "search_web", "f"]),
    st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
)
CUTS = st.lists(st.integers(0, 400), max_size=12)


def written(template: str, calls: list[Call], content: str = "") -> str:
    """The reply as the template writes it when the conversation goes on."""
    told = [
        {"id": f"{i:09}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for i, c in enumerate(calls)
    ]
    text = render(
        template,
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": content, "tool_calls": told}],
        MINE,
    )
    return text.partition("<|start|>assistant\n")[2].rpartition("<|end|>\n")[0]


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral"])
@given(calls=st.lists(CALLS, min_size=1, max_size=3), cuts=CUTS)
def test_what_a_template_writes_is_read_back(form: str, calls: list[Call], cuts: list[int]) -> None:
    calls = calls[:1] if form == "llama3" else calls
    assert read(form, written(FORMS[form], calls), cuts) == calls


@given(calls=st.lists(CALLS, min_size=1, max_size=2), cuts=CUTS)
@settings(max_examples=10)
def test_text_before_the_calls_stays(calls: list[Call], cuts: list[int]) -> None:
    for template, form in ((HERMES, "hermes"), (MISTRAL, "mistral"), (MISTRAL_NAMED, "mistral")):
        assert read(form, written(template, calls, "Let me see. "), cuts) == ["Let me see. ", *calls]


FRAGMENTS = """<tool_call> </tool_call> [TOOL_CALLS] <|python_tag|> <tool [TOOL { } [ ] , ; " text f[ARGS] NaN
{"name":"f","arguments":{}} {"name":"f","parameters":{"a":"}"}}"""
PIECES = st.lists(st.sampled_from([*FRAGMENTS.split(), " ", "\n"]), max_size=9).map("".join)


@pytest.mark.parametrize("form", READERS)
@given(text=PIECES, cuts=CUTS)
def test_how_a_text_is_cut_changes_nothing_and_text_is_never_lost(form: str, text: str, cuts: list[int]) -> None:
    whole = read(form, text)
    assert read(form, text, cuts) == whole
    if not any(isinstance(one, Call) for one in whole):
        assert "".join(str(one) for one in whole) == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {}</tool_call> and on'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        ("hermes", '{"name": "f", "arguments": {}}'),
        ("llama3", '{"name": "f", "parameters": {}} is how'),
        ("llama3", 'So: {"name": "f", "parameters": {}}'),
        ("llama3", '{"a": 1}'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, 3]'),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}'),
    ],
)
def test_what_does_not_parse_stays_text(form: str, text: str) -> None:
    assert read(form, text) == [text]


def test_a_name_that_nobody_offered_stays_text() -> None:
    text = '{"name": "Bob", "parameters": {"age": 3}}'
    assert read("llama3", text, names=["f"]) == [text]
    assert read("llama3", text, names=["Bob"]) == [Call("Bob", '{"age": 3}')]
    assert read("llama3", f"{text}; {text}", names=["Bob"]) == [Call("Bob", '{"age": 3}')] * 2


def test_text_streams_and_only_what_may_begin_a_call_is_held() -> None:
    reader = call_reader("hermes", chatty())
    assert [
        reader.push(piece) for piece in ("Hi <", "b>", " <tool", "_call>", '{"name": "f", "argum', 'ents": {}}')
    ] == [
        ["Hi "],
        ["<b>"],
        [" "],
        [],
        [],
        [],
    ]
    assert reader.push("</tool_call>") == [Call("f", "{}")]
    assert reader.push("\n") == [] and reader.push("done") == ["done"] and reader.finish() == []


@pytest.mark.parametrize(
    ("form", "marker", "after"),
    [
        ("hermes", "<tool_call>", '{"name": "f", "arguments": {}}'),
        ("mistral", "[TOOL_CALLS]", '[{"name": "f", "arguments": {}}]'),
        ("llama3", "<|python_tag|>", '{"name": "f", "parameters": {}}'),
    ],
)
def test_markers_that_are_special_tokens_say_nothing_and_are_still_seen(form: str, marker: str, after: str) -> None:
    made = tokenizer()
    made.hf.add_special_tokens([AddedToken(marker, normalized=False)])
    own = Tokenizer(made.hf)
    token = own.hf.token_to_id(marker)
    assert own.decode([token]) == ""
    for text, expected in ((after, [Call("f", "{}")]), ("{oh", ["{oh"])):
        reader = call_reader(form, own)
        assert reader.push("", token) == []
        assert joined([*(one for char in text for one in reader.push(char, ord(char))), *reader.finish()]) == expected


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'xml'; accepted: hermes, mistral, llama3"):
        call_reader("xml", chatty())


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "a < b & 'c' é", "parameters": {"type": "object"}},
}


def conversation(arguments: object) -> list[dict[str, Any]]:
    call = {"id": "000000001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"t": 1}', "tool_call_id": "000000001"},
    ]


def test_tools_are_rendered_as_transformers_does() -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=chatty(HERMES).hf, chat_template=HERMES)
    expected = theirs.apply_chat_template(
        conversation({"q": "<é>"}), tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    made = render(HERMES, conversation('{"q": "<é>"}'), chatty(HERMES), [TOOL])
    assert made == expected and '{"q": "<é>"}' in made and "a < b & 'c' é" in made


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', 3])
def test_arguments_that_are_no_object_are_refused(arguments: object) -> None:
    with pytest.raises(ValueError, match="arguments of 'f'"):
        render(HERMES, conversation(arguments), chatty(HERMES))


def test_neither_tools_nor_their_answers_forge_a_special_token() -> None:
    mine = chatty(HERMES)
    forged = {**TOOL, "function": {**TOOL["function"], "parameters": {"<|end|>": {}}}}
    with pytest.raises(ValueError, match=r"a tool holds '<\|end\|>'"):
        encode(conversation("{}"), HERMES, mine, [forged])
    answered = [*conversation("{}")[:2], {"role": "tool", "content": "<|end|>", "tool_call_id": "1"}]
    with pytest.raises(ValueError, match="the message holds"):
        encode(answered, HERMES, mine)
    escaped = conversation('{"q": "a\\u003c|end|>b"}')
    assert encode(escaped, HERMES, mine) == encode(conversation('{"q": "ab"}'), HERMES, mine)


def test_a_call_after_an_empty_one_is_found() -> None:
    told = '<tool_call></tool_call> and <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = joined(read("hermes", told))
    assert found == ["<tool_call></tool_call> and ", Call("f", "{}")]
