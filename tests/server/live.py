"""A server in a thread of this process, on a port of its own, over a tiny model."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import httpx

from assay.data.tokenizers import Tokenizer
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine, generate
from assay.engine.request import Grammar, Request
from assay.engine.server.config import Limits, ServerConfig
from assay.engine.server.logs import Log
from assay.engine.server.run import Server, listen, url
from assay.model.lm import LM, build
from assay.spec.load import change
from tests.cache.models import spec
from tests.engine.test_text import chatty

T = TypeVar("T")
NAME, CONTEXT, PAGE, RUNNING = "tiny", 2048, 4, 4
TEMPLATE = (
    "{%- if tools %}{{ bos_token + 'tools ' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{%- for m in messages %}{{ bos_token + m['role'] + '\\n' + (m['content'] | trim) + '<|end|>' }}"
    "{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}\n"
    "{% endfor %}{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
)


def words() -> Tokenizer:
    return chatty(TEMPLATE)


def tiny(seed: int = 1) -> LM:
    changes = {"vocab": 258, "context": CONTEXT}
    return build(change(spec(("full", "window"), "rope"), changes), seed).eval()


class Live:
    """`client` speaks HTTP to it; `ask` asks the engine in its own thread; `log` is what it wrote."""

    def __init__(
        self,
        keys: Iterable[str] | None = None,
        limits: Limits | None = None,
        watchers: Iterable[str] | None = None,
        **engine: Any,
    ) -> None:
        self.model, self.tokenizer, self.written = tiny(), words(), io.StringIO()
        given, watching = (None if some is None else frozenset(some) for some in (keys, watchers))
        self.config = ServerConfig(name=NAME, port=0, keys=given, watchers=watching, limits=limits or Limits())
        setup = EngineConfig(**{"max_running": RUNNING, "page": PAGE, **engine})
        self._make = lambda: Engine(self.model, self.tokenizer, setup)
        self._limit = setup.max_running + self.config.limits.waiting
        self._ready, self._failure = threading.Event(), list[BaseException]()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._ready.wait(60)
        for error in self._failure:
            raise error
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.loop.call_soon_threadsafe(self.server.leave)
        self.loop.call_soon_threadsafe(self.server.leave)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure.append(error)
            self._ready.set()

    async def _serve(self) -> None:
        listener = listen("127.0.0.1", 0)
        self.url, self.loop = url(listener), asyncio.get_running_loop()
        self.server = Server(self.config, self._make, self._limit, Log(self.written))
        await self.server.run(listener, self._ready.set)

    def ask(self, question: Callable[[Engine], T]) -> T:
        return asyncio.run_coroutine_threadsafe(self.server.worker.ask(question), self.loop).result(30)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def ok(self, path: str, body: Any, **more: Any) -> Any:
        answer = self.post(path, body, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer, which ends as it should."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            data = list(events(answer.iter_lines()))
        assert data.pop() == "[DONE]"
        return [json.loads(one) for one in data]

    def force(self, text: str) -> None:
        """From here on every reply is this text: each request gets a grammar that accepts nothing else."""

        def change(engine: Engine) -> None:
            submit, grammar = engine.submit, Grammar(choice=(text,))
            engine.submit = lambda request: submit(request.model_copy(update={"grammar": grammar}))  # type: ignore[method-assign]

        self.ask(change)

    def alone(self, prompt: Iterable[int], **request: Any) -> list[Any]:
        """What the engine says to a prompt by itself, without a server."""
        request = {"stop_tokens": self.tokenizer.ends, **request}
        return list(generate(self.model, self.tokenizer, [Request(prompt=tuple(prompt), **request)]))

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


def events(lines: Iterable[str]) -> Iterator[str]:
    """The data of server-sent events, of which each has one line."""
    for line in lines:
        if line:
            assert line.startswith("data: "), line
            yield line.removeprefix("data: ")


def until(question: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
