"""The routes: a body in, requests to the engine, an answer out. A client that leaves takes its requests with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from assay.engine.request import Grammar, Request
from assay.engine.server.chats import Chat
from assay.engine.server.config import ServerConfig
from assay.engine.server.errors import ApiError
from assay.engine.server.prompts import Desk, forced_call, grammar_param
from assay.engine.server.replies import Answer, Json, Names, Text, Usage, Writer
from assay.engine.server.schema import Bounds, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from assay.engine.server.wire import DONE, dumps, event
from assay.engine.server.worker import Call, Worker

T = TypeVar("T")
Kinds = tuple[str, str, str]  # the beginning of an id, `object` of a whole answer, and of a chunk
PAGES = ("pages_used", "pages_cached", "pages_total")  # of everybody: told where there is one key or none
GONE = 499  # nginx's word for a client that closed the connection before there was an answer


class Service:
    """Endpoints over one worker."""

    def __init__(self, config: ServerConfig, worker: Worker) -> None:
        self.config, self.worker, self.began = config, worker, int(time.time())
        self._desk: Desk | None = None
        self._compiling = asyncio.Semaphore(1)  # so that the other threads are left to those who bring no grammar

    async def desk(self) -> Desk:
        if self._desk is None:
            self._desk = await self.worker.ask(lambda engine: Desk.of(engine, self.config))
        return self._desk

    async def completions(self, body: CompletionBody, http: Http) -> Response:
        desk = await self.desk()
        requests = await asyncio.to_thread(desk.completions, body, http.state.tenant)
        names = Names(desk.tokenizer)
        writers = [Text(names, body.logprobs) for request in requests for _ in range(request.n)]
        answer = self._answer(desk, body, ("cmpl", "text_completion", "text_completion"), writers, requests)
        return await self._reply(body, http, requests, answer)

    async def chat(self, body: ChatBody, http: Http) -> Response:
        desk = await self.desk()
        request = await asyncio.to_thread(desk.chat, body, http.state.tenant)
        names, forced = Names(desk.tokenizer), forced_call(body) is not None
        writers = [Chat(names, request.logprobs, desk.reader(body), forced) for _ in range(request.n)]
        kinds = ("chatcmpl", "chat.completion", "chat.completion.chunk")
        return await self._reply(body, http, [request], self._answer(desk, body, kinds, writers, [request]))

    async def models(self) -> Response:
        desk = await self.desk()
        model = {"id": desk.name, "object": "model", "created": self.began, "owned_by": "assay"}
        more = {"context": desk.context, "chat": desk.template is not None}
        return _json({"object": "list", "data": [{**model, **more}]})

    async def tokenize(self, body: TokenizeBody) -> Response:
        desk = await self.desk()
        desk.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: accepted: it or messages, one of them", "prompt")
        if body.messages is not None:
            ids = await asyncio.to_thread(desk.conversation, body.messages)
        else:
            ids = await asyncio.to_thread(desk.text, body.prompt or "", body.add_special_tokens is not False)
        return _json({"tokens": ids, "count": len(ids), "max_model_len": desk.context})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        desk = await self.desk()
        desk.check_model(body.model)
        size = desk.tokenizer.vocab_size
        if body.tokens and max(body.tokens) >= size:
            message = f"tokens: {max(body.tokens)}; this tokenizer has ids 0 to {size - 1}"
            raise ApiError(400, message, "tokens")
        return _json({"prompt": await asyncio.to_thread(desk.tokenizer.decode, body.tokens)})

    def _answer(
        self, desk: Desk, body: Bounds, kinds: Kinds, writers: Sequence[Writer], requests: Sequence[Request]
    ) -> Answer:
        def more(tokens: int) -> Json:
            stats = {} if self.config.shared else self.worker.stats
            return {**desk.held(tokens), **{key: stats[key] for key in PAGES if key in stats}}

        usage = Usage(sum(len(request.source or request.prompt) for request in requests), more)
        return Answer(kinds[0], kinds[1:], desk.name, writers, usage, grammar_param(body))

    async def _reply(self, body: Bounds, http: Http, requests: Sequence[Request], answer: Answer) -> Response:
        facts = http.state.log
        facts |= {"prompt_tokens": answer.usage.prompt, "choices": len(answer.writers), "stream": bool(body.stream)}
        await self._compiled(requests[0].grammar, answer.grammar)
        call = await self.worker.submit(requests, http.state.tenant if self.config.shared else "")
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return Events(call, self._chunks(call, answer, usage, facts))
        try:
            whole = await unless_gone(http, answer.whole(call))
        finally:
            call.cancel()
            facts |= _told(call, answer)
        return Response(status_code=GONE) if whole is None else _json(whole)

    async def _compiled(self, grammar: Grammar | None, param: str | None) -> None:
        """ApiError 400 for a grammar that is refused, named by the field of the body that it came from."""
        if grammar is None:
            return
        desk = await self.desk()
        try:
            async with self._compiling:
                await asyncio.to_thread(desk.compile, grammar)
        except ValueError as error:
            raise ApiError(400, f"{param}: {str(error).partition(': ')[2]}", param) from None

    async def _chunks(self, call: Call, answer: Answer, usage: bool, facts: Json) -> AsyncIterator[bytes]:
        head, none = answer.head(True), {"usage": None} if usage else {}
        try:
            async for said in call:
                pieces = answer.pieces(call, said)
                if pieces:
                    yield b"".join(event({**head, "choices": [piece], **none}) for piece in pieces)
            if usage:
                yield event({**head, "choices": [], "usage": answer.usage.body})
        except ApiError as error:
            yield event(error.body)
        finally:
            facts |= _told(call, answer)
        yield DONE


class Events(StreamingResponse):
    """Server-sent events. However it ends, what still runs for it is cancelled."""

    def __init__(self, call: Call, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.cancel()


async def unless_gone(http: Http, answer: Awaitable[T]) -> T | None:
    """The answer; None, and no further work on it, when the client leaves first."""
    working, leaving = asyncio.ensure_future(answer), asyncio.create_task(_gone(http))
    try:
        done, _ = await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working in done else None
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _told(call: Call, answer: Answer) -> Json:
    """What the log has of a call."""
    usage = answer.usage
    return {"completion_tokens": usage.written, "cached_tokens": usage.cached, "unfinished": call.left}


def _json(value: Any) -> Response:
    return Response(dumps(value), media_type="application/json")
