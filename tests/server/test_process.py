"""`assay serve` as a process of its own: ready, drained, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from assay.cli.main import main
from assay.engine.server.run import ENDING_S
from assay.train.checkpoint import save_checkpoint
from tests.server.live import CONTEXT, events, tiny, until, words

SHORT = {"prompt": "a", "max_tokens": 3, "temperature": 0}
LONG = {"prompt": "a", "max_tokens": CONTEXT - 10, "ignore_eos": True, "stream": True}


class Process:
    """A running server. Its log goes to a file."""

    def __init__(self, checkpoint: Path, log: Path, *options: str) -> None:
        line = [sys.executable, "-m", "assay", "serve", str(checkpoint), "--port", "0", *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as stderr:
            self.child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
        assert self.child.stdout is not None
        self.line = self.child.stdout.readline()
        assert "http://" in self.line, log.read_text()
        self.client = httpx.Client(base_url=self.line.split()[-1], timeout=60)

    def end(self, number: int) -> None:
        self.child.send_signal(number)

    def status(self) -> int:
        return self.child.wait(20)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_checkpoint(folder, tiny(), words())
    return folder


@pytest.fixture
def process(checkpoint: Path, tmp_path: Path) -> Iterator[Process]:
    running = Process(checkpoint, tmp_path / "log", "--threads", "1", "--ready-file", str(tmp_path / "ready"))
    yield running
    running.client.close()
    running.child.kill()
    running.child.wait(20)


def test_it_says_where_it_is_and_ends_at_sigterm(process: Process, tmp_path: Path) -> None:
    assert process.line.startswith("tiny is served at http://127.0.0.1:")
    assert (tmp_path / "ready").read_text().strip() == process.line.split()[-1]
    assert process.client.get("/health").status_code == 200
    process.end(signal.SIGTERM)
    assert process.status() == 0
    assert [line["cancelled"] for line in process.lines() if line["event"] == "leaving"] == [0]


HELD = """
import sys, time
from pathlib import Path
from assay.engine.engine import Engine
from assay.engine.server import run
from assay.engine.server.config import Limits, ServerConfig
from tests.server.live import tiny, words

def made():
    engine, said = Engine(tiny(), words()), []
    step = engine.step
    def held():
        while said and not Path(sys.argv[1]).exists():
            time.sleep(0.01)
        told = step()
        said.extend(one for one in told if one.text)
        return told
    engine.step = held
    return engine

run.serve(ServerConfig(name="tiny", port=0, limits=Limits(drain_s=60)), made, 4, lambda url: print(url, flush=True))
run.end()
"""


def test_sigterm_lets_replies_finish(tmp_path: Path) -> None:
    """The reply stops at its first text, which is its first event, and goes on when the test says so: how fast the
    machine is does not matter."""
    go = tmp_path / "go"
    command = [sys.executable, "-c", HELD, str(go)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child,
        ExitStack() as last,
    ):
        last.callback(child.kill)
        assert child.stdout is not None and child.stderr is not None
        url = child.stdout.readline().strip()
        with (
            httpx.Client(base_url=url, timeout=60) as late,
            httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 20}, timeout=60) as answer,
        ):
            lines = events(answer.iter_lines())
            next(lines)
            child.send_signal(signal.SIGTERM)
            until(lambda: late.get("/health").status_code == 503)
            for refused in (late.post("/v1/completions", json=SHORT), late.get("/health")):
                assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
            go.touch()
            told = list(lines)
        assert told[-1] == "[DONE]" and json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
        assert child.wait(60) == 0
        log = [json.loads(line) for line in child.stderr.read().splitlines()]
    assert [line["cancelled"] for line in log if line["event"] == "leaving"] == [0]


@pytest.mark.slow
def test_a_kill_leaves_the_port_to_the_next_and_a_second_signal_ends_what_runs(
    process: Process, checkpoint: Path, tmp_path: Path
) -> None:
    text = process.client.post("/v1/completions", json=SHORT).json()["choices"][0]["text"]
    with process.client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = events(answer.iter_lines())
        next(lines)
        process.end(signal.SIGKILL)
        assert process.status() == -signal.SIGKILL
        with pytest.raises(httpx.HTTPError):
            list(lines)
    port = process.line.rstrip().rpartition(":")[2]
    again = Process(checkpoint, tmp_path / "again", "--port", port)
    try:
        assert again.line.rstrip().endswith(f":{port}")
        assert again.client.post("/v1/completions", json=SHORT).json()["choices"][0]["text"] == text
        ended_twice(again)
    finally:
        again.client.close()
        again.child.kill()


@pytest.mark.slow
def test_a_process_that_cannot_end_is_ended(tmp_path: Path) -> None:
    """Replies had 0.1 s, and everything after them `ENDING_S`: here a thread that ends with nothing holds it."""
    program = """
import threading, time
from assay.engine.server import run
from assay.engine.server.config import Limits, ServerConfig
from assay.engine.engine import Engine
from tests.server.live import tiny, words

def ready(url):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print(url, flush=True)

run.serve(ServerConfig(name="t", port=0, limits=Limits(drain_s=0.1)), lambda: Engine(tiny(), words()), 4, ready)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert b"http://" in child.stdout.readline()
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 1 and time.monotonic() - began < 0.1 + ENDING_S + 2
        assert json.loads(child.stderr.read().splitlines()[-1])["event"] == "late"


def ended_twice(process: Process) -> None:
    with process.client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = events(answer.iter_lines())
        next(lines)
        process.end(signal.SIGTERM)
        time.sleep(0.1)
        process.end(signal.SIGINT)
        rest = list(lines)
    assert "shutting down" in json.loads(rest[-2])["error"]["message"]
    assert process.status() == 0
    assert [line["cancelled"] for line in process.lines() if line["event"] == "leaving"] == [1]


def test_a_damaged_checkpoint_ends_with_its_message(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 100 if path.suffix == ".safetensors" else None])
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "safetensors" in capsys.readouterr().err
