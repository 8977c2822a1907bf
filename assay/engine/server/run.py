"""The server as a process: a socket, the loop, and an end that lets running replies finish."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from assay.engine.server.app import create_app
from assay.engine.server.config import ServerConfig
from assay.engine.server.connection import Connection
from assay.engine.server.errors import ApiError
from assay.engine.server.guard import Gate
from assay.engine.server.logs import Log, adopt
from assay.engine.server.metrics import Metrics
from assay.engine.server.worker import Served, Worker

GOING = "the server is shutting down"
IDLE_S = 75
"""Seconds until an idle connection is closed, as nginx has it: longer than clients keep theirs (httpx 5, uvicorn's own
default), so that it is they who close, and no request meets a connection that is being closed."""
CLOSING_S, STOPPING_S, ENDING_S = 0.8, 0.3, 1.5
"""After the replies, or the seconds that they had: until connections are cut off, and until a step is waited for no
more. The third bounds both, and whatever else a process does before it ends."""


class Server:
    """Answers on a bound socket. While the model loads, and while the last replies run, requests are told 503.

    limit: replies that may run or wait at once.
    """

    def __init__(self, config: ServerConfig, make: Callable[[], Served], limit: int, log: Log | None = None) -> None:
        self.config, self.gate, self.log = config, Gate(), log or Log()
        self.metrics = Metrics()
        self.worker = Worker(make, limit, self.metrics, self.log)
        self.app: FastAPI = create_app(config, self.worker, self.metrics, self.gate, self.log)
        self.going = asyncio.Event()
        self.now = asyncio.Event()

    def leave(self) -> None:
        """Take no more; finish what runs, up to the limit. Said a second time: at once."""
        (self.now if self.going.is_set() else self.going).set()

    async def run(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Until `leave`. Raises what making the engine raised."""
        config = uvicorn.Config(
            self.app,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=CLOSING_S,  # type: ignore[arg-type]
            http=partial(Connection, head_s=self.config.limits.head_s),  # type: ignore[arg-type]
            ws="none",
        )
        http = _Http(config)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            if await self._ready():
                self.gate.open()
                ready()
                await self.going.wait()
                self.gate.close(GOING)
                await self._drain()
        finally:
            http.should_exit = True
            await serving
            await self.worker.stop(STOPPING_S)

    async def _ready(self) -> bool:
        """Whether the engine came up before the server was told to leave."""
        starting = asyncio.create_task(self.worker.start())
        leaving = asyncio.create_task(self.going.wait())
        done, _ = await asyncio.wait({starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if starting not in done:
            starting.cancel()
            return False
        starting.result()
        return True

    async def _drain(self) -> None:
        """Wait for the replies under way; after the limit, end them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.limits.drain_s):
                while self.worker.under_way and not self.now.is_set():
                    await asyncio.sleep(0.02)
        self.log("leaving", cancelled=self.worker.under_way)
        self.worker.abort(ApiError(503, GOING))


class _Http(uvicorn.Server):
    """uvicorn without its own idea of signals: it would close the port first and end with the signal's status."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. OSError where the port is taken or the host is not this machine's."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _main(server: Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    def leave() -> None:
        if not server.going.is_set():
            last = threading.Timer(server.config.limits.drain_s + ENDING_S, _cut_off, (server.log,))
            last.daemon = True
            last.start()
        server.leave()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)
    await server.run(listener, ready)


def _cut_off(log: Log) -> NoReturn:
    """The process has outlived its signal by too long."""
    log("late")
    os._exit(1)


def serve(config: ServerConfig, make: Callable[[], Served], limit: int, ready: Callable[[str], None]) -> None:
    """Answer until SIGTERM or SIGINT. `ready` is told the URL once the first request can be answered. After the signal
    the process lives as long as replies may take, and `ENDING_S`."""
    listener = listen(config.host, config.port)
    server = Server(config, make, limit)
    adopt(server.log)
    asyncio.run(_main(server, listener, lambda: ready(url(listener))))


def end() -> NoReturn:
    """End the process, its work done. Python would take every module and object apart before: 1.3 s of processor time
    with torch, which were 6 on a busy machine."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)
