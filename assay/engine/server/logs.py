"""What happened, as one JSON object a line: ids, counts and times, never a prompt, a reply or a key."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any, TextIO

from assay.engine.server.wire import dumps

LIBRARIES = ("asyncio", "uvicorn")


class Log:
    """Writes events to `stream` (stderr). An exception is told by its type and places: its message may quote a text."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def __call__(self, event: str, error: BaseException | None = None, **facts: Any) -> None:
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            facts |= {"error": type(error).__name__, "at": [f"{f.filename}:{f.lineno} {f.name}" for f in frames]}
        line = dumps({"time": round(time.time(), 3), "event": event, **facts}).decode()
        stream = self.stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()


class Library(logging.Handler):
    """The warnings and errors of a library as lines of the same log; not what stands in them, which may be a text."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        error, event = record.exc_info[1] if record.exc_info else None, record.name.partition(".")[0]
        self.log(event, error, level=record.levelname.lower(), message=str(record.msg).partition("\n")[0])


def adopt(log: Log) -> None:
    """From here on what the libraries below the server say goes to `log` alone. asyncio speaks of clients that left in
    the middle of an answer."""
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers, library.propagate = [Library(log)], False
