"""Between the front and a worker: messages as JSON, and states as files in memory that have no name.

A state's file is handed on as an open descriptor. Nobody else can open it, it cannot change any more, and it is gone
with the last process that has it, however that one ends: there is nothing to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

from assay.engine.runner import Token

Message = Mapping[str, Any]


def put(pipe: Connection, message: Message, state: int | None = None) -> None:
    """Send a message, and with it the descriptor of a state. OSError when nobody reads any more."""
    pipe.send_bytes(json.dumps({**message, "carries": state is not None}).encode())
    if state is not None:
        send_handle(pipe, state, 0)  # the other's process id is not needed where descriptors are sent


def get(pipe: Connection) -> tuple[dict[str, Any], int | None]:
    """The next message and its state's descriptor. EOFError or OSError when the other side has ended."""
    message = json.loads(pipe.recv_bytes())
    return message, recv_handle(pipe) if message.pop("carries") else None


def store(data: bytes) -> int:
    """The descriptor of a new file with this content, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("assay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.fchmod(file, 0o600)
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
    with contextlib.suppress(OSError, AttributeError):  # only files in memory are sealed
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return file


def fetch(file: int) -> bytes:
    """The content; the descriptor is closed."""
    with os.fdopen(file, "rb") as opened:
        opened.seek(0)
        return opened.read()


def of_token(token: Token) -> list[Any]:
    where = [token.request, token.id, token.text, token.finish, token.choice]
    return [*where, token.logprob, token.top, token.reused, token.why]


def to_token(row: list[Any]) -> Token:
    request, id, text, finish, choice, logprob, top, reused, why = row
    return Token(request, id, text, finish, choice, logprob, tuple((i, value) for i, value in top), reused, why)
