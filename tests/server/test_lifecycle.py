"""Clients that leave, crowds, failures in the middle, and the end."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from assay.engine.request import Request, SamplingParams
from assay.engine.server import run
from assay.engine.server.config import Limits
from assay.engine.server.worker import Said
from tests.server.live import CONTEXT, Live, events, until
from tests.server.test_refusals import refusal

LONG = {"prompt": "go on and on", "max_tokens": CONTEXT - 20, "ignore_eos": True, "temperature": 1.0, "seed": 1}


def resting(server: Live) -> bool:
    """Nothing runs, waits, or holds a page."""
    stats = server.ask(lambda engine: engine.stats())
    return (stats["running"], stats["waiting"], stats["pages_used"]) == (0, 0, 0) and not server.server.worker.under_way


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_a_stream_frees_its_pages(live: Live, path: str) -> None:
    body = {**LONG, "stream": True, "n": 2}
    if "chat" in path:
        body |= {"messages": [{"role": "user", "content": str(body.pop("prompt"))}], "max_tokens": CONTEXT - 40}
    before = live.metric('assay_requests_total{outcome="cancelled"}')
    with live.client.stream("POST", path, json=body) as answer:
        lines = events(answer.iter_lines())  # dropped, it would close the stream
        assert len([line for _, line in zip(range(4), lines)]) == 4
        assert live.ask(lambda engine: engine.stats()["pages_used"]) > 0
    until(lambda: resting(live))
    assert live.metric('assay_requests_total{outcome="cancelled"}') == before + 2
    live.ask(lambda engine: engine.runner.cache.check_integrity())


def test_a_client_that_leaves_a_whole_answer_frees_its_pages(live: Live) -> None:
    before = live.metric('assay_requests_total{outcome="cancelled"}')
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/completions", json=LONG, timeout=0.3)
    until(lambda: resting(live))
    assert live.metric('assay_requests_total{outcome="cancelled"}') == before + 1


def test_a_cancelled_request_is_gone_before_the_next_step(live: Live) -> None:
    """Between the cancellation and the answer to this question stands no step."""

    def cancelled(engine: Any) -> tuple[int, int]:
        for number in {live.number for live in engine.jobs.values()}:
            engine.cancel(number)
        return engine.stats()["pages_used"], engine.stats()["running"]

    with live.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()  # dropped, it would close the stream
        next(lines)
        assert live.ask(lambda engine: engine.stats()["pages_used"]) > 0
        assert live.ask(cancelled) == (0, 0)
    until(lambda: resting(live))


def test_what_ended_before_anybody_read_it_is_whole(live: Live) -> None:
    """The engine may be done with a short reply before the loop comes to read its first token."""
    asked = Request(prompt=(97,), max_new=3, n=2, sampling=SamplingParams(temperature=0.0))

    async def late() -> list[Said]:
        call = await live.server.worker.submit([asked, asked])
        while call.left:
            await asyncio.sleep(0.005)
        return [said async for said in call]

    told = asyncio.run_coroutine_threadsafe(late(), live.loop).result(30)
    heard = Counter((said.index, said.token.choice, said.token.finish) for said in told)
    assert heard == {(i, c, finish): n for i in (0, 1) for c in (0, 1) for finish, n in ((None, 2), ("length", 1))}


def test_a_slow_reader_holds_nobody_up(live: Live) -> None:
    """A stream that nobody reads is computed to its end, while another client is served."""
    body = json.dumps({**LONG, "stream": True, "max_tokens": 200, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    address = live.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((address[0], int(address[1])))
        slow.sendall(head.encode() + body)
        until(lambda: live.server.worker.under_way == 1)
        assert live.ok("/v1/completions", {"prompt": "a", "max_tokens": 5})
        until(lambda: live.ask(lambda engine: not engine.busy), 30)
    until(lambda: resting(live))


@pytest.mark.slow  # it waits for six seconds
def test_a_connection_outlives_a_clients_own_patience(live: Live) -> None:
    """httpx keeps idle connections for 5 seconds: a server that closed them then would meet requests on their way."""
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"))
    for pause in (6.0, 0.0):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b""
        time.sleep(pause)
    connection.close()


def test_a_crowd_is_told_to_come_back() -> None:
    with Live(limits=Limits(waiting=1), max_running=1) as server:
        with (
            server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first,
            server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}),
        ):
            lines = first.iter_lines()  # dropped, it would close the stream
            next(lines)
            until(lambda: (server.metric("assay_running"), server.metric("assay_waiting")) == (1, 1))
            refused = server.post("/v1/completions", LONG)
            assert refusal(refused, 429)["type"] == "rate_limit_error" and refused.headers["retry-after"] == "1"
        until(lambda: resting(server))
        assert server.ok("/v1/completions", {"prompt": "a", "max_tokens": 2})


def test_more_than_run_at_once_say_what_each_says_alone() -> None:
    """Pages for fewer than the crowd: some wait or are put off, and every reply is that of an engine of its own."""
    prompts = [f"prompt number {i} " * (1 + i % 3) for i in range(9)]
    with Live(max_running=3, tokens=128, memory=80_000) as server:
        alone = [server.ok("/v1/completions", _greedy(p))["choices"][0]["text"] for p in prompts]
        found: dict[int, str] = {}

        def ask(at: int) -> None:
            events = server.stream("/v1/completions", _greedy(prompts[at]))
            found[at] = "".join(e["choices"][0]["text"] for e in events)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [found[i] for i in range(len(prompts))] == alone
        until(lambda: resting(server))


def _greedy(prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}


def test_a_failure_in_the_engine_ends_what_ran_and_nothing_else() -> None:
    with Live() as server:
        with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = events(answer.iter_lines())
            next(lines)
            server.ask(lambda engine: _break_once(engine))
            rest = list(lines)
        assert rest[-1] == "[DONE]" and json.loads(rest[-2])["error"]["type"] == "server_error"
        until(lambda: resting(server))
        assert server.ok("/v1/completions", {"prompt": "a", "max_tokens": 2})
        assert "planted" not in server.written.getvalue() and "ZeroDivisionError" in server.written.getvalue()


def _break_once(engine: Any) -> None:
    working = engine.runner.step

    def broken(work: Any, kept: bool) -> Any:
        engine.runner.step = working
        raise ZeroDivisionError("planted, with a prompt in it")

    engine.runner.step = broken


def test_times_are_measured(live: Live) -> None:
    names = ("assay_ttft_seconds", "assay_queue_seconds", "assay_inter_token_seconds")
    before = [live.metric(f"{name}_count") for name in names]
    tokens, prompts = live.metric("assay_completion_tokens_total"), live.metric("assay_prompt_tokens_total")
    live.ok("/v1/completions", {"prompt": "abc", "max_tokens": 5, "ignore_eos": True})
    assert [live.metric(f"{name}_count") - was for name, was in zip(names, before)] == [1, 1, 4]
    assert live.metric("assay_completion_tokens_total") - tokens == 5
    assert live.metric("assay_prompt_tokens_total") - prompts == 3
    assert live.metric("assay_ttft_seconds_sum") >= live.metric("assay_queue_seconds_sum") > 0
    assert live.metric("assay_pages_total") > 0


def test_the_end_waits_for_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer than all that there is: its client is cut off, and the server has ended before the step."""
    monkeypatch.setattr(run, "CLOSING_S", 0.2)
    done, stuck = threading.Event(), threading.Event()

    def slow(engine: Any) -> None:
        step = engine.step

        def held() -> Any:
            stuck.set()
            done.wait(20)
            return step()

        engine.step = held

    server = Live(limits=Limits(drain_s=0.1)).__enter__()
    server.ask(slow)
    with ThreadPoolExecutor(1) as pool, server.client:
        asked = pool.submit(server.post, "/v1/completions", LONG)
        assert stuck.wait(10)
        began = time.monotonic()
        server.loop.call_soon_threadsafe(server.server.leave)
        server._thread.join(10)
        took = time.monotonic() - began
        told = asked.result(10)
        done.set()
    assert took < 5 and told.status_code == 503 and "shutting down" in told.text
