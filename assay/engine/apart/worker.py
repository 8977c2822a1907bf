"""A process with an engine: obeys the front's messages between two steps, and tells what was said.

One with the role `prefill` gives every reply away once it has said its first token. While states wait to be sent it
reads nothing more: so what lies between two processes stays bounded, and a slow decoder slows the reader down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from assay.engine.apart import wire
from assay.engine.apart.router import Role
from assay.engine.engine import Engine
from assay.engine.handoff import layout, layouts, pack, unpack
from assay.engine.request import Request
from assay.engine.runner import Token
from assay.engine.server.memory import Tidy

LOOK_S = 0.05  # seconds between two reports of an engine that works
BEAT_S = 1.0  # seconds between two signs of life of one that waits


@dataclass(frozen=True)
class Post:
    """What a worker is told when it starts. key: states are signed with it. in_flight: bytes of them under way."""

    role: Role
    key: bytes
    in_flight: int


@dataclass
class Place:
    """A request of the front in this engine: its number there, and replies that have not ended here."""

    number: int
    left: int


class Worker:
    """Serves an engine behind a pipe until the front says stop or is gone."""

    def __init__(self, pipe: Connection, post: Post, engine: Engine) -> None:
        self.pipe, self.post, self.engine = pipe, post, engine
        self.places: dict[int, Place] = {}  # by the engine's own numbers
        self.outgoing: deque[tuple[dict[str, Any], bytes]] = deque()
        self.under_way = 0
        self.notes: list[dict[str, Any]] = []
        self.looked = 0.0
        self.tidy = Tidy()

    def serve(self) -> None:
        while self._obey():
            if self.works:
                self._step()
                self.tidy.worked()
            self._send()

    @property
    def works(self) -> bool:
        return self.engine.busy and not self.outgoing

    def _obey(self) -> bool:
        """Do what has been asked for; without work, wait for it, and say that it is there. False: stop."""
        while True:
            if not self.pipe.poll(0.0 if self.works else BEAT_S):
                if self.works:
                    return True
                wire.put(self.pipe, {"is": "beat"})
                self.tidy.rested()
                continue
            message, state = wire.get(self.pipe)
            match message["do"]:
                case "submit":
                    self._submit(message["number"], Request.model_validate(message["request"]))
                case "adopt":
                    assert state is not None
                    self._adopt(message, state)
                case "cancel":
                    self._cancel(message["number"])
                case "credit":
                    self.under_way -= message["bytes"]
                case "stop":
                    return False
            self._send()

    def _submit(self, number: int, request: Request) -> None:
        try:
            self.places[self.engine.submit(request)] = Place(number, request.n)
        except ValueError as error:
            for choice in range(request.n):
                self._give_up(number, choice, str(error))

    def _adopt(self, message: dict[str, Any], state: int) -> None:
        number, choice = message["number"], message["choice"]
        try:
            handed = unpack(wire.fetch(state), self.post.key)
            note = {"is": "taken", "from": message["from"], "bytes": message["bytes"]}
            weakref.finalize(handed.swapped, self.notes.append, note)  # memory that counts until it goes on here
            self.places[self.engine.adopt(handed)] = Place(number, 1)
        except ValueError as error:
            self._give_up(number, choice, str(error))

    def _cancel(self, number: int) -> None:
        for mine in [mine for mine, place in self.places.items() if place.number == number]:
            del self.places[mine]
            self.engine.cancel(mine)
        self.outgoing = deque(one for one in self.outgoing if one[0]["number"] != number)
        self._look(not self.engine.busy)

    def _give_up(self, number: int, choice: int, why: str) -> None:
        self.notes.append({"is": "said", "tokens": [wire.of_token(Token(number, None, "", "error", choice, why=why))]})

    def _step(self) -> None:
        tokens = self.engine.step()
        reads = self.post.role == "prefill"
        said = [wire.of_token(replace(token, request=self.places[token.request].number)) for token in tokens]
        for token in tokens:
            if token.finish is None and reads:
                self._hand_over(token)
            if token.finish is not None or reads:
                self._left(token.request)
        self._look(any(token.finish for token in tokens) or not self.engine.busy)  # before anybody hears that it ended
        if said:
            self.notes.append({"is": "said", "tokens": said})

    def _left(self, mine: int) -> None:
        self.places[mine].left -= 1
        if not self.places[mine].left:
            del self.places[mine]

    def _hand_over(self, token: Token) -> None:
        data = pack(self.engine.hand_over(token.request, token.choice), self.post.key)
        number = self.places[token.request].number
        self.outgoing.append(({"is": "handed", "number": number, "choice": token.choice, "bytes": len(data)}, data))

    def _look(self, now: bool) -> None:
        at = time.monotonic()
        if now or at - self.looked > LOOK_S:
            self.looked = at
            self.notes.append({"is": "stats", "stats": self.engine.stats()})

    def _send(self) -> None:
        """What was said goes first, then states as far as they may be under way."""
        notes, self.notes[:] = list(self.notes), []
        for note in notes:
            wire.put(self.pipe, note)
        while self.outgoing:
            message, data = self.outgoing[0]
            if self.under_way and self.under_way + len(data) > self.post.in_flight:
                return
            self.outgoing.popleft()
            self.under_way += len(data)
            self._send_state(message, data)

    def _send_state(self, message: dict[str, Any], data: bytes) -> None:
        state = wire.store(data)
        with open(state, "rb"):
            wire.put(self.pipe, message, state)


def work(pipe: Connection, post: Post, make: Callable[[], Engine]) -> None:
    """The process's main function. It ends with the front, and says why where it ends of its own accord.

    At once: it holds nothing that outlives it, and tearing an interpreter with torch down takes a second.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the front decides
    with contextlib.suppress(EOFError, OSError):  # the front is gone
        _serve(pipe, post, make)
    os._exit(0)


def _serve(pipe: Connection, post: Post, make: Callable[[], Engine]) -> None:
    try:
        engine = make()
        cache = engine.runner.cache
        stored = {"dtype": str(cache.dtype), "layout": layout(cache), "takes": layouts(cache)}
        wire.put(pipe, {"is": "ready", "stats": engine.stats(), **stored})
        Worker(pipe, post, engine).serve()
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        wire.put(pipe, {"is": "broken", "why": str(error), "kind": type(error).__name__})
