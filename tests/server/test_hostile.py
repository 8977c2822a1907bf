"""Clients that mean harm: connections that are held, places that one key would take, work without bounds."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from assay.engine.grammar import written
from assay.engine.request import Grammar, GrammarLimits
from assay.engine.server import trial
from assay.engine.server.config import Limits
from assay.engine.tools import Call, call_reader
from tests.engine.test_text import chatty
from tests.server.live import Live, until
from tests.server.test_guard import KEYS, bearer
from tests.server.test_refusals import refusal

ASK = {"prompt": "a", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
LONG = {**ASK, "max_tokens": 400, "stream": True}
HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def strict() -> Iterator[Live]:
    """A second for the headers; and of everything else little."""
    with Live(limits=Limits(head_s=1.0, stop_chars=3, told=40)) as server:
        yield server


def connected(server: Live) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=8)


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"", b""), (b"", HEAD + b"x-slow: "), (HEAD + b"\r\n", b""), (HEAD + b"\r\n", HEAD)],
    ids=["silent", "slow", "asks and rests", "asks and is slow then"],
)
def test_who_connects_and_does_not_ask_is_let_go(strict: Live, first: bytes, then: bytes) -> None:
    """Whoever is answered may rest between two requests, and not in the middle of one."""
    rests = bool(first) and not then
    with connected(strict) as client:
        if first:
            client.sendall(first)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        client.sendall(then)
        client.settimeout(3.0)
        try:
            assert client.recv(1 << 16) == b"" and not rests
        except TimeoutError:
            assert rests


def test_a_header_without_end_is_cut_off(strict: Live) -> None:
    with connected(strict) as client, pytest.raises(OSError):
        client.sendall(HEAD + b"x: ")
        for _ in range(64):
            client.sendall(b"y" * (1 << 20))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400")
        raise OSError


def test_another_protocol_is_not_spoken(strict: Live) -> None:
    with connected(strict) as client:
        upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        client.sendall(HEAD + upgrade + b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert not client.recv(1 << 16).startswith(b"HTTP/1.1 101")


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"stop": ["b", "abcd"]}, "stop", "4 characters; accepted: up to 3"),
        ({"logprobs": 9, "max_tokens": 5}, "logprobs", "50 of them in one call; accepted: up to 40"),
        ({"logprobs": 1, "max_tokens": 7, "n": 3}, "logprobs", "42 of them"),
        ({"logprobs": 1, "max_tokens": 7, "prompt": ["a", "b", "c"]}, "logprobs", "42 of them"),
    ],
)
def test_what_would_take_too_much_is_refused(strict: Live, more: dict[str, Any], param: str, message: str) -> None:
    error = refusal(strict.post("/v1/completions", {**ASK, **more}))
    assert error["param"] == param and message in error["message"]
    assert strict.ok("/v1/completions", {**ASK, "stop": "abc", "logprobs": 9, "max_tokens": 4})


ENDLESS = {"allOf": [{"type": "string", "pattern": f".*{i}.*{i + 1}.*"} for i in range(40)]}
"""2 kB, and years: what all these have in common is looked for in 3.6 times the time for each of them."""


def test_a_schema_that_is_compiled_for_ever_holds_nobody_up(strict: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, problem = threading.Event(), trial.problem

    def tried(text: str, seconds: int) -> str | None:
        begun.set()
        return problem(text, seconds)

    monkeypatch.setattr(trial, "problem", tried)
    asked = {**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ENDLESS}}}
    served = strict.metric("assay_ttft_seconds_count")
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(strict.post, "/v1/completions", asked)
        assert begun.wait(10)
        while not told.done():
            assert strict.ok("/v1/completions", ASK)
    error = refusal(told.result())
    assert error == {
        **error,
        "param": "response_format",
        "message": "response_format: compiling it takes more than 2 s",
    }
    assert strict.metric("assay_ttft_seconds_count") > served, "nobody was served beside it"
    assert strict.ask(lambda engine: len(engine.chooser.grammars)) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_too_much_work_in_mid_reply_says_so(strict: Live, stream: bool) -> None:
    """As a fault of the request, which no client asks again; nobody beside it is disturbed."""
    count = 500 + stream  # what was too much once is so from the first token on
    asked = {**ASK, "max_tokens": 60, "guided_regex": f"(?:(?:a?){{{count}}}a{{{count}}})", "stream": stream}
    limits = strict.ask(lambda engine: engine.chooser.grammars.limits)
    strict.ask(lambda engine: setattr(engine.chooser.grammars, "limits", GrammarLimits(step_fuel=50)))
    try:
        answer = strict.post("/v1/completions", asked)
    finally:
        strict.ask(lambda engine: setattr(engine.chooser.grammars, "limits", limits))
    if stream:
        lines = [line for line in answer.text.split("\n\n") if line]
        assert answer.status_code == 200 and '"text":"a"' in lines[0] and lines[-1] == "data: [DONE]"
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
    else:
        error = refusal(answer)
    assert error == {
        "type": "invalid_request_error",
        "message": "guided_regex: this reply cannot go on: lexer error: too many expressions constructed",
        "param": "guided_regex",
        "code": None,
    }
    assert strict.ok("/v1/completions", ASK)


def test_a_grammar_that_ends_its_compiler_ends_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = written(Grammar(regex="a+"))
    assert trial.problem(good, 1) is None
    assert trial.problem(written(Grammar(regex="a(")), 1) is None, "refused at once, by who compiles it"
    broken = tmp_path / "broken.py"
    broken.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(trial, "__file__", str(broken))
    assert trial.problem(good, 1) == "compiling it ended with signal 11"
    broken.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(trial, "PATIENCE", 0.1)
    assert trial.problem(good, 1) == "compiling it takes more than 1 s"


def test_one_key_does_not_take_all_places() -> None:
    """Of 9 places it gets 4, since 5 then stay free, and who comes with another key gets 2 of those."""
    with Live(keys=KEYS, limits=Limits(waiting=8), max_running=1) as server, ExitStack() as held:

        def begin(key: str) -> None:
            answer = server.client.stream("POST", "/v1/completions", json=LONG, headers=bearer(key))
            held.enter_context(answer)

        begin(KEYS[0])
        threads = [threading.Thread(target=begin, args=(KEYS[0],), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: server.server.worker.owned.total() == 4)
        told = refusal(server.post("/v1/completions", ASK, headers=bearer(KEYS[0])), 429)
        assert told["message"] == "too many replies are under way, 4 of them of this key"
        assert "--metrics-key-file" in refusal(server.client.get("/metrics", headers=bearer(KEYS[0])), 403)["message"]
        assert server.ok("/v1/completions", {**ASK, "prompt": ["a", "b"]}, headers=bearer(KEYS[1]))
        assert server.server.worker.owned.total() >= 3, "the other key's replies were waited for"


def test_where_the_engine_fails_nobody_waits_for_ever() -> None:
    """Neither who is in its thread, nor who stands before it, nor who comes then."""
    with Live() as server:
        begun, go = threading.Event(), threading.Event()

        def fail(_: Any) -> int:
            begun.set()
            go.wait(10)
            raise RuntimeError("planted")

        server.ask(lambda engine: setattr(engine, "submit", fail))
        found: list[int] = []

        def ask() -> None:
            found.append(server.post("/v1/completions", ASK).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert begun.wait(10)
        until(lambda: server.server.worker.under_way == 2)
        go.set()
        for thread in threads:
            thread.join(10)
        assert found == [503, 503]
        assert server.client.get("/health").status_code == 503
        refusal(server.post("/v1/completions", ASK), 503)
        assert server.server.worker.under_way == 0 and not server.server.worker._promised


def test_markers_inside_an_argument_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply may hold thousands of them (a client may ask for any text), and comes in as many pieces."""
    from assay.engine import tools

    tries, read = [0], tools._json

    def counted(text: str) -> Any:
        tries[0] += 1
        return read(text)

    monkeypatch.setattr(tools, "_json", counted)
    reader = call_reader("hermes", chatty(), ["f"])
    inside = "</tool_call>" * 50
    pieces = [f'<tool_call>{{"name": "f", "arguments": {{"a": "{inside}', *("x" * 60), '"}}', "</tool_call>", "end"]
    found = [one for piece in pieces for one in reader.push(piece)] + reader.finish()
    assert found == [Call("f", f'{{"a": "{inside}{"x" * 60}"}}'), "end"]
    assert tries[0] == 51
