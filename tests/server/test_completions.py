"""/v1/completions and /v1/chat/completions say what the engine says, whole or in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.engine.request import SamplingParams
from assay.engine.template import encode
from assay.ops.step import rows_step
from tests.server.live import NAME, Live

PROMPT = "once upon"
HEAT = {"temperature": 0.9, "seed": 5, "top_p": 0.95}


def said(tokens: list[Any], choice: int = 0) -> str:
    return "".join(token.text for token in tokens if token.choice == choice)


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream, of either kind."""
    choices = [c for event in events for c in event["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


@pytest.mark.parametrize("how", [{"temperature": 0}, HEAT, {**HEAT, "stop": ["a", "é"], "top_k": 40, "min_p": 0.01}])
def test_whole_streamed_and_the_engine_say_the_same(live: Live, how: dict[str, Any]) -> None:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, **how}
    whole = live.ok("/v1/completions", body)
    events = live.stream("/v1/completions", body)
    drawn = {key: value for key, value in how.items() if key != "stop"}
    alone = live.alone(PROMPT.encode(), max_new=40, sampling=SamplingParams(**drawn), stop=tuple(how.get("stop", ())))
    choice = whole["choices"][0]
    assert choice["text"] == joined(events) == said(alone)
    assert choice["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == alone[-1].finish
    assert whole["usage"]["prompt_tokens"] == len(PROMPT) and whole["usage"]["completion_tokens"] == len(alone)
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert whole["object"] == "text_completion" and {e["id"] for e in events} == {events[0]["id"]}


def test_prompts_come_as_texts_and_as_ids(live: Live) -> None:
    ask = {"max_tokens": 6, "temperature": 0}
    forms = [[PROMPT, "two"], [list(PROMPT.encode()), list(b"two")]]
    texts = [[c["text"] for c in live.ok("/v1/completions", {"prompt": f, **ask})["choices"]] for f in forms]
    ones = [live.ok("/v1/completions", {"prompt": f, **ask})["choices"][0]["text"] for f in (*forms[0], *forms[1])]
    assert texts[0] == texts[1] == ones[:2] == ones[2:] and ones[0] != ones[1]


def test_choices_are_the_engines_in_their_order(live: Live) -> None:
    body = {"prompt": [PROMPT, "two"], "max_tokens": 8, "n": 2, "temperature": 1.0, "seed": 3}
    whole = live.ok("/v1/completions", body)
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    events = live.stream("/v1/completions", body)
    for at, text in enumerate(c["text"] for c in whole["choices"]):
        alone = live.alone((PROMPT, "two")[at // 2].encode(), max_new=8, n=2, sampling=SamplingParams(seed=3))
        assert text == joined(events, at) == said(alone, at % 2)
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]


def test_logprobs_are_the_models_own(live: Live) -> None:
    """Against a forward pass of the whole text."""
    whole = live.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "logprobs": 3, "ignore_eos": True, **HEAT})
    told = whole["choices"][0]["logprobs"]
    ids = [t.id for t in live.alone(PROMPT.encode(), max_new=5, stop_tokens=(), sampling=SamplingParams(**HEAT))]
    with torch.no_grad():
        logits = live.model(rows_step(torch.tensor([*PROMPT.encode(), *ids])[None])).logits
    expected = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
    wanted = [expected[at, token].item() for at, token in enumerate(ids)]
    assert told["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    for at, top in enumerate(told["top_logprobs"]):
        best = expected[at].topk(3).values.tolist()
        assert sorted(top.values())[-3:] == pytest.approx(sorted(best), abs=1e-4)
        assert 3 <= len(top) <= 4 and told["tokens"][at] in top
    events = live.stream(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "logprobs": 3, "ignore_eos": True, **HEAT}
    )
    pieces = [e["choices"][0]["logprobs"] for e in events]
    for key in told:
        assert [item for piece in pieces for item in piece[key]] == told[key]


@pytest.mark.parametrize("how", [{"temperature": 0}, HEAT])
def test_a_conversation_is_the_templates_text(live: Live, how: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 2, **how}
    whole = live.ok("/v1/chat/completions", body)
    events = live.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    template = str(live.tokenizer.config["chat_template"])
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = encode(plain, template, live.tokenizer)
    alone = live.alone(prompt, max_new=20, sampling=SamplingParams(**how))
    message = whole["choices"][0]["message"]
    assert message["content"] == joined(events) == said(alone) and message["role"] == "assistant"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    told = whole["choices"][0]["logprobs"]["content"]
    assert [bytes(one["bytes"] or []) for one in told] == [
        bytes([t.id]) if t.id < 256 else b"" for t in alone[: len(told)]
    ]
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    usage = events[-1]["usage"]
    assert events[-1]["choices"] == [] and all(e["usage"] is None for e in events[:-1])
    assert usage["prompt_tokens"] == len(prompt) and usage["completion_tokens"] == len(alone)


def test_a_prompts_beginning_is_not_computed_twice(live: Live) -> None:
    prompt = "the same long beginning of every prompt of this test, "
    first = live.ok("/v1/completions", {"prompt": prompt + "one", "max_tokens": 4, "temperature": 0})
    hits = live.metric("assay_prefix_hit_tokens_total")
    again = live.ok("/v1/completions", {"prompt": prompt + "two", "max_tokens": 4, "temperature": 0})
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, again)]
    assert cached[0] == 0 and cached[1] == len(prompt) // 4 * 4
    assert live.metric("assay_prefix_hit_tokens_total") - hits == cached[1]
    assert again["choices"][0]["text"] == said(
        live.alone((prompt + "two").encode(), max_new=4, sampling=SamplingParams(temperature=0))
    )


def test_state_bytes_are_the_declared_ones(live: Live) -> None:
    """Two layers of 2 heads of 4 for keys and values in float32; one of them sees 5 tokens."""
    usage = live.ok("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True})[
        "usage"
    ]
    tokens = len(PROMPT) + 3
    assert usage["assay"]["state_bytes"] == 2 * 2 * 4 * 4 * (tokens + 5)
    assert usage["assay"]["pages"] == -(-tokens // 4)


def test_words_come_and_go(live: Live) -> None:
    made = live.ok("/tokenize", {"prompt": "héllo"})
    assert bytes(made["tokens"]) == "héllo".encode() and made["count"] == 6
    assert live.ok("/detokenize", {"tokens": made["tokens"]}) == {"prompt": "héllo"}
    messages = [{"role": "user", "content": "hi"}]
    asked = live.ok("/tokenize", {"messages": messages})["tokens"]
    assert tuple(asked) == encode(messages, str(live.tokenizer.config["chat_template"]), live.tokenizer)


def test_models_and_health(live: Live) -> None:
    listed = live.client.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == [NAME] and listed["data"][0]["chat"] is True
    assert live.client.get("/health").status_code == 200
