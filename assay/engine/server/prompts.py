"""Bodies of clients to requests of the engine: what is asked of this model, and what it cannot do, named by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from assay.data.tokenizers import Tokenizer
from assay.engine.config import source_limit
from assay.engine.engine import Engine
from assay.engine.grammar import Grammars, written
from assay.engine.request import Grammar, Request, SamplingParams, Serving
from assay.engine.server import trial
from assay.engine.server.config import Limits, ServerConfig
from assay.engine.server.errors import ApiError
from assay.engine.server.schema import Bounds, ChatBody, CompletionBody, Drawing, Json, Message, NamedTool
from assay.engine.server.worker import Served
from assay.engine.template import chat_template, encode
from assay.engine.tools import Reader, call_form, call_reader

COMPLETION_TOKENS = 16  # of a completion that does not say: OpenAI's default
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Desk:
    """What turns a body into requests: the model's name, words and sizes.

    context: tokens that a prompt and its reply may have together. grammars: those that the engine keeps. state_bytes:
    what a sequence of so many tokens has in the cache. page: tokens of a page, null without pages. source: tokens that
    an encoder reads at most; 0 without one. With one, prompts are what it reads, and replies follow what the checkpoint
    begins them with.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    vocab: int
    limits: Limits
    grammars: Grammars
    state_bytes: Callable[[int], int]
    page: int | None
    template: str | None
    calls: str | None
    source: int = 0

    @classmethod
    def of(cls, engine: Served, config: ServerConfig) -> Desk:
        store = engine.runner.cache if isinstance(engine, Engine) else engine
        fields = [field for fields in store.fields.values() for field in fields]
        dtype = str(store.dtype).removeprefix("torch.")

        def state_bytes(tokens: int) -> int:
            return sum(field.bytes(tokens, dtype) for field in fields)

        sizes = (engine.tokens, engine.spec.vocab, config.limits, engine.chooser.grammars)
        template = chat_template(engine.tokenizer)
        calls = call_form(template, engine.tokenizer) if template is not None else None
        source = source_limit(engine.spec)
        return cls(config.name, engine.tokenizer, *sizes, state_bytes, engine.config.page, template, calls, source)

    def held(self, tokens: int) -> Json:
        """What a conversation of so many tokens has in the cache."""
        return {"state_bytes": self.state_bytes(tokens), "pages": -(-tokens // self.page) if self.page else 0}

    def reader(self, body: ChatBody) -> Reader | None:
        """What finds calls in one reply; None where none are offered, or nobody knows how the model writes them."""
        tools = offered(body)
        if tools is None or self.calls is None:
            return None
        return call_reader(self.calls, self.tokenizer, [tool["function"]["name"] for tool in tools])

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            message = f"model: {model!r} is not served here; accepted: {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def completions(self, body: CompletionBody, tenant: str) -> list[Request]:
        """A request for each prompt of the body."""
        self.check_model(body.model)
        rest = self._shared(body, tenant) | {"logprobs": body.logprobs}
        new = body.max_tokens if body.max_tokens is not None else COMPLETION_TOKENS
        prompts = self._prompts(body)
        self._check_told(body.logprobs, new * body.choices * len(prompts))
        return [self._request(ids, new, "prompt", rest) for ids in prompts]

    def chat(self, body: ChatBody, tenant: str) -> Request:
        self.check_model(body.model)
        tools = offered(body)
        self._small(json.dumps(tools), "tools")
        prompt = self.conversation(body.messages, tools)
        rest = self._shared(body, tenant)
        if body.logprobs:
            rest["logprobs"] = body.top_logprobs or 0
        if (forced := forced_call(body)) is not None:
            if rest["grammar"] is not None:
                raise ApiError(400, "response_format: not together with a tool that is to be called", "response_format")
            rest["grammar"] = Grammar(json_schema=self._small(json.dumps(forced), "tools"))
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens: accepted: it or max_completion_tokens", "max_tokens")
        new = body.max_completion_tokens or body.max_tokens
        self._check_prompt(prompt, "messages")
        known = len(self.tokenizer.reply_starts(prompt)) if self.source else len(prompt)
        new = new or max(1, self.context - known)
        self._check_told(rest.get("logprobs"), new * body.choices)
        return self._request(prompt, new, "messages", rest)

    def compile(self, grammar: Grammar) -> None:
        """Have it compiled for the engine, in this thread. ValueError where that takes too long, or it is refused."""
        if grammar not in self.grammars:
            if (why := trial.problem(written(grammar), self.grammars.limits.compile_s)) is not None:
                raise ValueError(f"grammar: {why}")
            self.grammars.keep(grammar)

    def conversation(self, messages: Iterable[Message], tools: list[Json] | None = None) -> Ids:
        """The ids that ask for the next reply."""
        if self.template is None:
            raise ApiError(400, "messages: this model has no chat template: use /v1/completions", "messages")
        try:
            return encode([message_of(m) for m in messages], self.template, self.tokenizer, tools)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None

    def text(self, text: str, special: bool = True, param: str = "prompt") -> Ids:
        try:
            whole = self.tokenizer.framed if self.source else self.tokenizer.begun
            made = whole(text) if special else self.tokenizer.encode(text)
        except ValueError as error:
            raise ApiError(400, str(error), param) from None
        return tuple(made.tolist())

    def _prompts(self, body: CompletionBody) -> list[Ids]:
        given: Any = body.prompt
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        prompts = given if several else [given]
        if len(prompts) > self.limits.prompts:
            raise ApiError(400, f"prompt: {len(prompts)} of them; accepted: up to {self.limits.prompts}", "prompt")
        made = [self.text(p) if isinstance(p, str) else tuple(p) for p in prompts]
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        return [ids or (() if first is None else (first,)) for ids in made]

    def _check_prompt(self, prompt: Ids, param: str) -> None:
        most = self.source or self.context - 1
        limit = min(self.limits.prompt_tokens or most, most)
        if not prompt:
            raise ApiError(400, f"{param}: empty, and this model's tokenizer names no token to begin with", param)
        if len(prompt) > limit:
            raise ApiError(400, f"{param}: {len(prompt)} tokens; accepted: up to {limit}", param, LONG)
        if max(prompt) >= self.vocab:
            raise ApiError(400, f"{param}: token {max(prompt)}; this model has ids 0 to {self.vocab - 1}", param)

    def _check_told(self, top: int | None, tokens: int) -> None:
        """They are kept until the client has read them, and each is many times as large as its token."""
        wanted = 0 if top is None else tokens * (1 + top)
        if wanted > self.limits.told:
            message = f"logprobs: {wanted} of them in one call; accepted: up to {self.limits.told}"
            raise ApiError(400, message, "logprobs")

    def _request(self, prompt: Ids, new: int, param: str, rest: Mapping[str, Any]) -> Request:
        self._check_prompt(prompt, param)
        if self.source:
            starts = self.tokenizer.reply_starts(prompt)
            if not starts:
                raise ApiError(400, "decoder_start_token_id: this checkpoint names no token that a reply begins with")
            rest, prompt = {**rest, "source": prompt}, starts
        if len(prompt) + new > self.context:
            message = f"max_tokens: a prompt of {len(prompt)} tokens and {new} new ones are {len(prompt) + new}"
            raise ApiError(400, f"{message}; the context of this model is {self.context} tokens", "max_tokens", LONG)
        try:
            return Request(prompt=prompt, max_new=new, **rest)
        except ValidationError as error:
            raise ApiError(400, said(error)) from None

    def _shared(self, body: Bounds, tenant: str) -> dict[str, Any]:
        """What both kinds of body say of a request."""
        limits = self.limits
        if len(body.stops) > limits.stops:
            raise ApiError(400, f"stop: {len(body.stops)} texts; accepted: up to {limits.stops}", "stop")
        longest = max(map(len, body.stops), default=0)
        if longest > limits.stop_chars:
            raise ApiError(400, f"stop: {longest} characters; accepted: up to {limits.stop_chars}", "stop")
        if body.choices > limits.choices:
            raise ApiError(400, f"n: {body.choices}; accepted: 1 to {limits.choices}", "n")
        return {
            "sampling": self._sampling(body),
            "stop_tokens": frozenset() if body.ignore_eos else self.tokenizer.ends,
            "stop": tuple(body.stops),
            "min_new": body.min_tokens or 0,
            "n": body.choices,
            "grammar": self._grammar(body),
            "serving": Serving(tenant=tenant),
        }

    def _sampling(self, body: Drawing) -> SamplingParams:
        given = {name: getattr(body, name) for name in Drawing.model_fields if getattr(body, name) is not None}
        biases = {int(key): value for key, value in given.pop("logit_bias", {}).items()}
        if biases and max(biases) >= self.vocab:
            message = f"logit_bias: token {max(biases)}; this model has ids 0 to {self.vocab - 1}"
            raise ApiError(400, message, "logit_bias")
        return SamplingParams(**given, logit_bias=tuple(biases.items()))

    def _grammar(self, body: Bounds) -> Grammar | None:
        form = body.response_format
        asked: dict[str, dict[str, Any]] = {}
        if form is not None and form.json_schema is not None:
            asked["response_format"] = {"json_schema": json.dumps(form.json_schema["schema"])}
        elif form is not None and form.type == "json_object":
            asked["response_format"] = {"json_object": True}
        if body.guided_regex is not None:
            asked["guided_regex"] = {"regex": body.guided_regex}
        if body.guided_choice is not None:
            asked["guided_choice"] = {"choice": tuple(body.guided_choice)}
        if len(asked) > 1:
            raise ApiError(400, f"{' and '.join(asked)}: accepted: one of them", next(iter(asked)))
        for param, fields in asked.items():
            self._small(json.dumps(fields), param)
            try:
                return Grammar(**fields)
            except ValidationError as error:
                raise ApiError(400, f"{param}: {said(error)}", param) from None
        return None

    def _small(self, text: str, param: str) -> str:
        if len(text) > self.limits.schema_bytes:
            message = f"{param}: {len(text)} bytes; accepted: up to {self.limits.schema_bytes}"
            raise ApiError(400, message, param)
        return text


def said(error: ValidationError) -> str:
    """What is wrong, without pydantic's word for it."""
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


def grammar_param(body: Bounds) -> str | None:
    """The field that a grammar came from."""
    fields = ("guided_regex", "guided_choice", "response_format", "tools")
    return next((name for name in fields if getattr(body, name, None) is not None), None)


LONG = "context_length_exceeded"


def message_of(message: Message) -> dict[str, Any]:
    """As chat templates know it: the content is a text; what was not said is not there."""
    given = message.model_dump(exclude_none=True, exclude={"content"})
    return given | {"content": message.text}


def offered(body: ChatBody) -> list[Json] | None:
    """The tools that the template is told of."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def forced_call(body: ChatBody) -> Json | None:
    """The schema of a reply that has to be a call: {"name", "arguments"} of one tool, or of any of them."""
    choice = body.tool_choice
    if choice != "required" and not isinstance(choice, NamedTool):
        return None
    wanted = [
        tool.function
        for tool in body.tools or ()
        if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name
    ]
    shared: Json = {}
    for name, schema in (item for f in wanted for item in ((f.parameters or {}).get("$defs") or {}).items()):
        if shared.setdefault(name, schema) != schema:  # references are looked up at the root, where all tools meet
            raise ApiError(400, f"tools: two meanings of $defs.{name}; accepted: one", "tools")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": f.name}, "arguments": f.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in wanted
    ]
    whole = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**whole, "$defs": shared} if shared else whole
