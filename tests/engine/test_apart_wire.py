"""What lies between two processes: states without a name, and no more of them than may be. Without the processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import stat
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from assay.engine.apart import wire
from assay.engine.apart.router import Role
from assay.engine.apart.worker import Post, Worker
from assay.engine.engine import Engine
from assay.engine.handoff import unpack
from assay.engine.runner import Token
from tests.engine.apart import PAGES, TEXT, asked, lm_of

KEY = b"k" * 32


@pytest.fixture
def pipe() -> Iterator[tuple[Connection, Connection]]:
    ends = multiprocessing.Pipe()
    with ends[0], ends[1]:
        yield ends


def worker(pipe: Connection, role: Role, in_flight: int = 1) -> Worker:
    return Worker(pipe, Post(role, KEY, in_flight), Engine(lm_of("full-linear"), TEXT, PAGES))


def come(pipe: Connection) -> tuple[dict[str, Any], bytes | None]:
    """The next message, with its state read."""
    message, state = wire.get(pipe)
    return message, None if state is None else wire.fetch(state)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_and_states_come_as_they_were_sent(pipe: tuple[Connection, Connection]) -> None:
    before, data = descriptors(), os.urandom(100_000)
    said = Token(3, 7, "é\ud7ff", None, 1, -math.inf, ((7, -0.5), (2, -math.inf)), 4)
    for state in (data, None, b""):
        file = None if state is None else wire.store(state)
        wire.put(pipe[0], {"is": "said", "token": wire.of_token(said)}, file)
        if file is not None:
            os.close(file)
    for state in (data, None, b""):
        message, got = come(pipe[1])
        assert wire.to_token(message["token"]) == said and got == state
    assert descriptors() == before


def test_a_state_has_no_name_and_cannot_change() -> None:
    file = wire.store(b"state")
    with os.fdopen(file, "r+b", buffering=0) as opened:
        assert stat.S_IMODE(os.fstat(file).st_mode) == 0o600 and os.fstat(file).st_nlink == 0
        for change in (lambda: os.pwrite(file, b"o", 0), lambda: opened.truncate(0), lambda: opened.truncate(99)):
            with pytest.raises(PermissionError):
                change()
        assert os.readlink(f"/proc/self/fd/{file}").startswith("/memfd:")  # in no folder


def test_the_reader_stops_while_as_much_as_may_be_is_under_way(pipe: tuple[Connection, Connection]) -> None:
    """Three prompts are read in one step, and there is room for one state: a fourth is not read until all are sent."""
    front, own = pipe
    reader = worker(own, "prefill")
    for number in range(3):
        wire.put(front, {"do": "submit", "number": number, "request": asked(9 + number).model_dump(mode="json")})
    thread = threading.Thread(target=reader.serve)
    thread.start()
    for number in range(3):
        said, data = until_handed(front, number)
        assert said == ({0, 1, 2} if number == 0 else set())
        assert unpack(data, KEY).swapped.length == 9 + number
        if number == 0:
            wire.put(front, {"do": "submit", "number": 3, "request": asked(20).model_dump(mode="json")})
        assert number == 2 or not front.poll(0.1)
        wire.put(front, {"do": "credit", "bytes": len(data)})
    assert until_handed(front, 3)[0] == {3}
    wire.put(front, {"do": "stop"})
    thread.join(10)
    assert not thread.is_alive() and reader.engine.runner.cache.used_bytes() == 0


def until_handed(pipe: Connection, number: int) -> tuple[set[int], bytes]:
    """Who said something until the state of this request came, and the state."""
    said: set[int] = set()
    while pipe.poll(10):
        message, state = come(pipe)
        if message["is"] == "handed":
            assert state is not None and (message["number"], message["bytes"]) == (number, len(state))
            return said, state
        said |= {row[0] for row in message.get("tokens", ())}
    raise AssertionError("nothing came")


def test_a_state_from_elsewhere_ends_its_reply_alone(pipe: tuple[Connection, Connection]) -> None:
    front, own = pipe
    writer = worker(own, "decode")
    file = wire.store(b"no state at all, but long enough to be one")
    wire.put(front, {"do": "adopt", "number": 5, "choice": 1, "from": 0, "bytes": 42}, file)
    os.close(file)
    wire.put(front, {"do": "stop"})
    writer.serve()
    note, _ = come(front)
    token = wire.to_token(note["tokens"][0])
    assert token == Token(5, None, "", "error", 1, why=token.why) and "damaged, or comes from elsewhere" in token.why
    assert not writer.engine.busy
