"""Clients of all manners for benchmarks/soak.py: what they ask of a server, and what the answers must be.

A reply of temperature 0 is compared with what the model said to the same prompt alone, in this process and without
pages. The model's lead of the likeliest token over the next is at least `LEAD` nats at every token that is compared.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from assay.data.tokenizers import Tokenizer
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.engine.template import chat_template, encode
from assay.model.lm import LM

LEAD, REPLY, PATIENCE_S = 1e-3, 64, 120.0
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    """What is asked, as ids or as messages, and the ids that the model says alone."""

    prompt: tuple[int, ...]
    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]
    ended: bool  # the last of `ids` is a stop token

    def text(self, tokens: int) -> str:
        """Of the first `tokens` ids: bytes are their own ids, and special tokens say nothing."""
        return bytes(i for i in self.ids[:tokens] if i < 256).decode("utf-8", "replace")


def cases(model: LM, words: Tokenizer, count: int, seed: int, reply: int = REPLY) -> list[Case]:
    """Prompts of 1 to 400 tokens, many of which begin alike, and their replies, of up to `reply` tokens."""
    draw, template = random.Random(seed), chat_template(words) or ""
    shared = ["".join(chr(draw.randrange(32, 127)) for _ in range(320)) for _ in range(3)]
    found: list[Case] = []
    while len(found) < count:
        text = draw.choice(shared)[: draw.choice((0, 0, 16, 100, 256, 320))]
        text += "".join(chr(draw.randrange(32, 127)) for _ in range(draw.choice((1, 5, 30, 80))))
        chats = len(found) % 3 == 2
        messages = ({"role": "user", "content": text.strip() or "x"},) if chats else ()
        prompt = tuple(encode(list(messages), template, words)) if chats else tuple(text.encode())
        case = alone(model, words, prompt, messages, reply)
        if len(case.ids) >= 4:
            found.append(case)
    return found


def alone(
    model: LM, words: Tokenizer, prompt: tuple[int, ...], messages: tuple[dict[str, str], ...], reply: int
) -> Case:
    greedy = SamplingParams(temperature=0.0)
    request = Request(prompt=prompt, sampling=greedy, max_new=reply, logprobs=2, stop_tokens=words.ends)
    ids: list[int] = []
    for token in generate(model, words, [request]):
        if token.id is None or token.top[0][1] - token.top[1][1] < LEAD:
            break
        ids.append(token.id)
    return Case(prompt, messages, tuple(ids), bool(ids) and ids[-1] in words.ends)


class Wrong(Exception):
    """An answer that is not what it must be."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


class Traffic:
    """Asks the server at `url`; `counts` says how often what was done, `begun` what is under way and since when."""

    def __init__(self, url: str, model: str, found: Sequence[Case], draw: random.Random) -> None:
        self.model, self.cases, self.draw, self.counts = model, found, draw, Counter[str]()
        self.begun: dict[int, tuple[str, float]] = {}
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)
        self.api = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=httpx.AsyncClient(timeout=PATIENCE_S, limits=limits),
        )
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "greedy": (8, self.greedy),
            "greedy stream": (6, lambda: self.greedy(stream=True)),
            "slow reader": (1, lambda: self.greedy(stream=True, pause=0.03)),
            "stop": (2, self.stop),
            "several prompts": (2, self.several),
            "drawn": (6, self.drawn),
            "schema": (2, self.schema),
            "left in a stream": (4, self.leave),
            "left before the answer": (2, self.hang_up),
            "refused": (5, self.refused),
        }

    async def close(self) -> None:
        await self.http.aclose()
        await self.api.close()

    async def once(self, kind: str | None = None) -> None:
        """One visit, of a kind that is drawn. Wrong, or what the client raises."""
        names = list(self.kinds)
        kind = kind or self.draw.choices(names, [weight for weight, _ in self.kinds.values()])[0]
        key = id(asyncio.current_task())
        self.begun[key] = kind, time.monotonic()
        try:
            await self.kinds[kind][1]()
            self.counts[kind] += 1
        except Wrong as error:
            raise Wrong(f"{kind}: {error}") from None
        finally:
            del self.begun[key]

    async def greedy(self, stream: bool = False, pause: float = 0.0) -> None:
        """What is said is what the model says alone, to the token, whole or streamed, in one choice or several."""
        case = self.draw.choice(self.cases)
        new, n = self.draw.randint(1, len(case.ids)), self.draw.choice((1, 1, 1, 3))
        body: dict[str, Any] = {"model": self.model, "max_tokens": new, "temperature": 0, "n": n}
        if self.draw.random() < 0.2:
            body["logprobs"] = True if case.messages else 2
        texts, ends, written = await (self._streamed(case, body, pause) if stream else self._whole(case, body))
        finish = "stop" if case.ended and new == len(case.ids) else "length"
        must(texts == [case.text(new)] * n, f"said {texts!r}, and alone {case.text(new)!r} ({len(case.prompt)} tokens)")
        must(ends == [finish] * n, f"ended with {ends}, not {finish}")
        must(written == n * new, f"{written} tokens were counted, not {n * new}")

    async def _whole(self, case: Case, body: dict[str, Any]) -> tuple[list[str], list[str | None], int]:
        if case.messages:
            answer = await self.api.chat.completions.create(messages=case.messages, **body)
            texts = [choice.message.content or "" for choice in answer.choices]
        else:
            answer = await self.api.completions.create(prompt=list(case.prompt), **body)
            texts = [choice.text for choice in answer.choices]
        return texts, [choice.finish_reason for choice in answer.choices], answer.usage.completion_tokens

    async def _streamed(
        self, case: Case, body: dict[str, Any], pause: float
    ) -> tuple[list[str], list[str | None], int]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        if case.messages:
            events = await self.api.chat.completions.create(messages=case.messages, **body)
        else:
            events = await self.api.completions.create(prompt=list(case.prompt), **body)
        texts, ends, written = [""] * body["n"], [None] * body["n"], -1
        async for one in events:
            written = one.usage.completion_tokens if one.usage else written
            for choice in one.choices:
                texts[choice.index] += (choice.delta.content or "") if case.messages else choice.text
                ends[choice.index] = choice.finish_reason or ends[choice.index]
            if pause:
                await asyncio.sleep(pause)
        return texts, ends, written

    async def stop(self) -> None:
        """A reply ends before its first stop text."""
        case = self.draw.choice([case for case in self.cases if not case.messages])
        whole = case.text(len(case.ids)).rstrip("\ufffd")
        at = self.draw.randrange(len(whole))
        stop = whole[at : at + self.draw.randint(1, 2)]
        body = {"model": self.model, "max_tokens": len(case.ids), "temperature": 0, "stop": [stop]}
        answer = await self.api.completions.create(prompt=list(case.prompt), **body)
        must("\ufffd" in stop or answer.choices[0].text == whole.partition(stop)[0], f"{stop!r} of {whole!r}")
        must(answer.choices[0].finish_reason == "stop", f"ended with {answer.choices[0].finish_reason}")

    async def several(self) -> None:
        """Replies to the prompts of one call stand in the order of the prompts."""
        chosen = self.draw.sample([case for case in self.cases if not case.messages], 3)
        new = min(len(case.ids) - case.ended for case in chosen)
        body = {"model": self.model, "max_tokens": new, "temperature": 0}
        answer = await self.api.completions.create(prompt=[list(case.prompt) for case in chosen], **body)
        texts = [choice.text for choice in answer.choices]
        must(texts == [case.text(new) for case in chosen], f"said {texts!r}")

    async def drawn(self) -> None:
        """Every choice ends, within its bounds, with a logprob for each token that is part of it."""
        draw, n = self.draw, self.draw.choice((1, 1, 2, 4))
        new, case = draw.randint(1, REPLY), draw.choice(self.cases)
        body: dict[str, Any] = {"model": self.model, "max_tokens": new, "n": n, "temperature": draw.choice((0.7, 1.0))}
        body |= draw.choice(({}, {"top_p": 0.9}, {"seed": draw.randrange(1 << 30)}, {"frequency_penalty": 0.5}))
        least = draw.choice((0, 0, draw.randint(1, new)))
        more = draw.choice(({}, {"top_k": 5}, {"min_p": 0.05}, {"repetition_penalty": 1.1}, {"ignore_eos": True}))
        more = more | ({"min_tokens": least} if least else {})
        answer = await self.api.completions.create(prompt=list(case.prompt), logprobs=3, extra_body=more, **body)
        must(len(answer.choices) == n, f"{len(answer.choices)} choices of {n}")
        told = [len(choice.logprobs.token_logprobs) for choice in answer.choices]
        ends = [choice.finish_reason for choice in answer.choices]
        fine = all(
            (end == "length" and count == new) or (end == "stop" and count < new) for end, count in zip(ends, told)
        )
        must(fine and min(told) >= least, f"{told} tokens of {least} to {new}, ended with {ends}")
        stops = ends.count("stop")  # a stop token is counted, and is not part of the reply
        must(answer.usage.completion_tokens == sum(told) + stops, f"{answer.usage.completion_tokens} tokens counted")

    async def schema(self) -> None:
        ask: dict[str, Any] = {"model": self.model, "max_tokens": 300, "temperature": 1.0, "response_format": FORM}
        said = [{"role": "user", "content": "x" * self.draw.randint(1, 60)}]
        choice = (await self.api.chat.completions.create(messages=said, **ask)).choices[0]
        must(choice.finish_reason == "stop", f"ended with {choice.finish_reason}")
        try:
            value = json.loads(choice.message.content or "")
        except ValueError:
            raise Wrong(f"said {choice.message.content!r}") from None
        must(set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y"), f"said {value!r}")

    async def leave(self) -> None:
        """Hear some of a stream, and go."""
        case = self.draw.choice(self.cases)
        body: dict[str, Any] = {"model": self.model, "prompt": list(case.prompt), "max_tokens": 600, "n": 2}
        events = await self.api.completions.create(stream=True, extra_body={"ignore_eos": True}, **body)
        left = self.draw.randint(0, 20)
        async for _ in events:
            if not left:
                break
            left -= 1
        await events.close()

    async def hang_up(self) -> None:
        case, more = self.draw.choice(self.cases), {"ignore_eos": True}
        body: dict[str, Any] = {"model": self.model, "prompt": list(case.prompt), "max_tokens": 600, "n": 2}
        try:
            async with asyncio.timeout(self.draw.uniform(0.01, 0.4)):
                await self.api.completions.create(extra_body=more, **body)
        except TimeoutError:
            pass

    async def refused(self) -> None:
        """What no server may accept is told so, in OpenAI's shape."""
        path, content, kind, status = self.draw.choice(REFUSED)
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        answer = await self.http.post(path, content=raw, headers={"content-type": kind})
        must(answer.status_code == status, f"{raw[:80]!r} to {path}: {answer.status_code}, not {status}")
        must(status in (404, 405) or answer.json()["error"]["message"], f"{raw[:80]!r}: {answer.text[:200]}")


HI = [{"role": "user", "content": "hi"}]
IS_JSON = "application/json"
REFUSED: Sequence[tuple[str, Any, str, int]] = [
    (COMPLETIONS, '{"prompt": "a", ', IS_JSON, 400),
    (COMPLETIONS, "", IS_JSON, 400),
    (COMPLETIONS, "[" * 5000, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a"}, "text/plain", 415),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": {"a": 1}}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": [1, -1]}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": [10**9]}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "n": 0}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "model": "another"}, IS_JSON, 404),
    (COMPLETIONS, {"prompt": "a" * 5000}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**6}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": ["a"] * 65}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": ["a"] * 64, "n": 16}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a" * (5 << 20)}, IS_JSON, 413),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "("}, IS_JSON, 400),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, IS_JSON, 400),
    (CHATS, {"messages": []}, IS_JSON, 400),
    (CHATS, {"messages": HI, "response_format": {"type": "json_schema"}}, IS_JSON, 400),
    (CHATS, {"messages": HI, "top_logprobs": 3}, IS_JSON, 400),
    (CHATS, {"messages": [{"role": "robot", "content": "hi"}]}, IS_JSON, 400),
    (CHATS, {"messages": [{"role": "user", "content": "\ud800"}]}, IS_JSON, 400),
    ("/v1/nothing", {}, IS_JSON, 404),
    ("/health", {}, IS_JSON, 405),
]
