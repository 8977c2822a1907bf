"""Who may ask: names of hosts, origins, keys and the files that hold them; and what the log says of it."""

from __future__ import annotations

import io
import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from assay.cli.main import main
from assay.engine.server.config import ServerConfig, is_loopback, read_keys
from assay.engine.server.logs import LIBRARIES, Log, adopt
from tests.server.live import Live, until
from tests.server.test_refusals import refusal

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
WATCHER = "the-key-of-who-watches"
ASK = {"prompt": "a prompt that no log may hold", "max_tokens": 2, "temperature": 0}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:80", "10.0.0.1", "127.0.0.1.attacker.example", ""]
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics"])
def test_another_name_for_this_machine_is_refused(live: Live, host: str, path: str) -> None:
    assert "host" in refusal(live.client.get(path, headers={"host": host}), 403)["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "127.0.0.1:80", "[::1]:80"])
def test_names_of_this_machine_are_not(live: Live, host: str) -> None:
    assert live.client.get("/health", headers={"host": host}).status_code == 200


def test_other_sites_pages_are_refused(live: Live) -> None:
    refusal(live.post("/v1/completions", ASK, headers={"origin": "https://attacker.example"}), 403)
    refusal(live.post("/v1/completions", ASK, headers={"origin": "null"}), 403)
    assert live.post("/v1/completions", ASK, headers={"origin": live.url}).status_code == 200
    form = {"content-type": "text/plain"}
    refusal(live.client.post("/v1/completions", content=json.dumps(ASK), headers=form), 415)
    answer = live.client.options(
        "/v1/completions", headers={"origin": live.url, "access-control-request-method": "POST"}
    )
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind, status", [("application/json", 413), ("text/plain", 415)])
def test_who_sends_too_much_hears_it(live: Live, kind: str, status: int) -> None:
    """A client that sends all of its body before it reads: no reset takes its answer away, nor does it wait for it."""
    address, began = live.url.removeprefix("http://").split(":"), time.monotonic()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
    head += f"content-length: {64 << 20}\r\n\r\n"
    with socket.create_connection((address[0], int(address[1]))) as client:
        client.sendall(head.encode())
        for _ in range(64):
            client.sendall(b" " * (1 << 20))
        assert client.recv(1 << 16).startswith(f"HTTP/1.1 {status}".encode())
    assert time.monotonic() - began < 5.0


def test_headers_that_every_answer_has(live: Live) -> None:
    for answer in (live.client.get("/"), live.client.get("/nowhere"), live.post("/v1/completions", ASK)):
        assert answer.headers["x-content-type-options"] == "nosniff" and len(answer.headers["x-request-id"]) == 16
    policy = live.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_keys_open_and_separate() -> None:
    with Live(keys=KEYS, watchers=[WATCHER]) as server:
        wrong = [{}, {"authorization": KEYS[0]}, *map(bearer, ("x", KEYS[0][:-1], "é" * 20, WATCHER))]
        for headers in wrong:
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            error = refusal(httpx.post(f"{server.url}/v1/completions", json=ASK, headers=raw), 401)
            assert error["code"] == "invalid_api_key"
        for headers in ({}, bearer(KEYS[0])):
            refusal(server.client.get("/metrics", headers=headers), 401)
        assert "assay_pages_used" in server.client.get("/metrics", headers=bearer(WATCHER)).text
        assert server.client.get("/health").status_code == server.client.get("/").status_code == 200
        told = [server.ok("/v1/completions", ASK, headers=bearer(key)) for key in (KEYS[0], KEYS[0], KEYS[1], KEYS[1])]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in told]
        assert len({one["choices"][0]["text"] for one in told}) == 1
        assert cached == [0, 28, 0, 28]  # what one key stored is not another's
        assert {name for one in told for name in one["usage"]["assay"]} == {"state_bytes", "pages"}  # nor is its load
        assert server.client.get("/health", headers={"host": "any.example"}).status_code == 200
        log = server.written.getvalue()
    assert not [key for key in KEYS if key in log]


def test_the_log_has_counts_and_no_texts(live: Live) -> None:
    before = len(live.written.getvalue())
    whole = live.ok("/v1/completions", ASK)
    refusal(live.post("/v1/completions", {**ASK, "secret": 1}))
    until(lambda: live.written.getvalue()[before:].count("\n") == 2)  # a line is written after its answer
    lines = [json.loads(line) for line in live.written.getvalue()[before:].splitlines()]
    assert [(line["event"], line["status"], line["route"]) for line in lines] == [
        ("request", 200, "/v1/completions"),
        ("request", 400, "/v1/completions"),
    ]
    assert lines[0]["prompt_tokens"] == len(ASK["prompt"]) and lines[0]["completion_tokens"] == 2  # type: ignore[arg-type]
    text = live.written.getvalue()
    assert "no log may" not in text and "secret" not in text and whole["choices"][0]["text"] not in text


def test_what_libraries_say_are_lines_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in map(logging.getLogger, LIBRARIES):
        for name, value in (("handlers", []), ("propagate", True)):  # put back after the test
            monkeypatch.setattr(library, name, value)
    written = io.StringIO()
    adopt(Log(written))
    logging.getLogger("asyncio").warning("socket.send() raised exception.")
    logging.getLogger("uvicorn.error").error("in: %s", ASK["prompt"])
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [("asyncio", "warning"), ("uvicorn", "error")]
    assert "no log may" not in written.getvalue()


def test_a_key_file_is_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEYS[0]}\n\n{KEYS[1]}\n")
    for mode in (0o644, 0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ValueError, match=f"mode {mode:03o}"):
            read_keys(path)
    path.chmod(0o600)
    assert read_keys(path) == set(KEYS)
    for text, message in (
        ("", "no key"),
        ("# a\n", "no key"),
        ("short\n", "16 or more"),
        ("a b" * 10, "without spaces"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_keys(path)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.4", False),
        ("", False),
        ("localhost.attacker.example", False),
    ],
)
def test_only_this_machine_is_served_without_keys(host: str, own: bool) -> None:
    assert is_loopback(host) == own
    if own:
        ServerConfig(name="a", host=host)
    else:
        with pytest.raises(ValueError, match="--api-key-file"):
            ServerConfig(name="a", host=host)
    ServerConfig(name="a", host=host, keys=frozenset(KEYS))


@pytest.mark.parametrize("keys", [None, frozenset({*KEYS, WATCHER})])
def test_keys_of_the_metrics_are_others(keys: frozenset[str] | None) -> None:
    with pytest.raises(ValueError, match="--metrics-key-file"):
        ServerConfig(name="a", keys=keys, watchers=frozenset({WATCHER}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--dtype", "int3"], "accepted: f32, bf16"),
        (["--port", "70000"], "70000"),
        (["--device", "tpu"], "accepted: auto, cpu"),
    ],
)
def test_the_verb_refuses_by_name(tmp_path: Path, capsys: Any, more: list[str], message: str) -> None:
    assert main(["serve", str(tmp_path), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["serve", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
