"""The one thread that owns the engine, and the way from the event loop to it and back.

Commands go in through a thread-safe queue and are run between two steps; what a step said goes out in one call to the
loop, into a queue for each call. Such a queue is never waited for, so a slow reader holds nobody up. It holds at most
what its requests may say (`max_new` tokens of each choice), and `limit` bounds how many may be under way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from assay.engine.apart.cluster import Cluster
from assay.engine.engine import Engine
from assay.engine.grammar import is_grammars
from assay.engine.request import Request
from assay.engine.runner import Token
from assay.engine.server.errors import ApiError
from assay.engine.server.memory import Tidy
from assay.engine.server.observer import Observer

T = TypeVar("T")
Served = Engine | Cluster
Status = Literal["loading", "ready", "failed", "stopped"]
Ending = Literal["cancelled", "error"]
FAILED = "the engine has failed"
LOOK_S = 0.05  # seconds between two reports of a busy engine: one goes over all pages of the cache
GATHER_S, TICK_S = 0.1, 0.002  # seconds that an idle engine waits for requests that are being read, and looks again


@dataclass(frozen=True)
class Said:
    """A token of request `index` of a call, and when the engine had it (time.monotonic)."""

    index: int
    token: Token
    at: float


class Call:
    """Requests that one client made together: what they say, in the order in which it was said."""

    def __init__(self, worker: Worker, requests: Sequence[Request], tenant: str = "") -> None:
        self.requests, self.tenant, self.began = tuple(requests), tenant, time.monotonic()
        self.left = sum(request.n for request in requests)
        self._worker = worker
        self._events: asyncio.Queue[Said | ApiError] = asyncio.Queue()
        self.accepted: asyncio.Future[None] = worker.promise()

    def put(self, event: Said | ApiError) -> None:
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[Said]:
        """Until the last choice has ended. ApiError when the engine cannot go on with it."""
        missing = sum(request.n for request in self.requests)  # `left` may have come to 0 before anybody reads
        while missing:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            missing -= event.token.finish is not None
            yield event

    def cancel(self) -> None:
        """Nobody reads any more: what still runs is taken from the engine before its next step."""
        self._worker.cancel(self)


@dataclass
class _Open:
    """A request in the engine: its call, its place there, choices that still speak and when each last did."""

    call: Call
    index: int
    left: int
    last: dict[int, float]
    started: bool = False


class Worker:
    """`start` makes the engine in a thread of its own; `submit` gives it requests. Everything but what begins with
    an underscore belongs to the event loop."""

    def __init__(self, make: Callable[[], Served], limit: int, observer: Observer, log: Callable[..., None]) -> None:
        self.status: Status = "loading"
        self.stats: Mapping[str, Any] = {}
        self.under_way, self.limit = 0, limit
        self.owned = Counter[str]()  # of `under_way`, by tenant
        self.coming = set[asyncio.Task[Any] | None]()  # whose requests are here, and are being read or checked
        self._promised: set[asyncio.Future[Any]] = set()  # what the engine's thread has yet to answer
        self._speaking: set[Call] = set()
        self._make, self._observer, self._log = make, observer, log
        self._inbox: SimpleQueue[Callable[[Served], None]] = SimpleQueue()
        self._open: dict[int, _Open] = {}
        self._running, self._looked = True, 0.0
        self.tidy = Tidy()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    async def start(self) -> None:
        """Returns when the engine is ready; raises what making it raised."""
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._ready = ready
        self._thread.start()
        try:
            await ready
        except BaseException:
            self.status = "failed"
            raise
        self.status = "ready"

    async def stop(self, patience: float) -> None:
        """End the thread after the step that it is in, which is waited for that many seconds."""
        self.status = "stopped"
        self._inbox.put(self._quit)
        await asyncio.to_thread(self._thread.join, patience)

    async def submit(self, requests: Sequence[Request], tenant: str = "") -> Call:
        """A call under way. ApiError 429 when too much is; 400 for what the engine refuses of it.

        A tenant, where there are several, may have as many replies under way as places stay free: nobody takes them
        all (the dynamic threshold of Choudhury and Hahne 1998).
        """
        self._check_well()
        size = sum(request.n for request in requests)
        most = self.limit // 2 if tenant else self.limit
        if size > most:
            raise ApiError(400, f"n: {size} replies in one call; accepted: up to {most} in all", "n")
        free = self.limit - self.under_way - size
        if tenant and self.owned[tenant] + size > free:  # how many places are free tells what others do
            raise ApiError(429, f"too many replies are under way, {self.owned[tenant]} of them of this key", retry=1)
        if free < 0:
            raise ApiError(429, f"{self.under_way} replies are under way, and {self.limit} may be", retry=1)
        call = Call(self, requests, tenant)
        self.under_way += size
        self.owned[tenant] += size
        self._speaking.add(call)
        self._inbox.put(lambda engine: self._submit(engine, call))
        self.coming.discard(asyncio.current_task())
        try:
            await call.accepted
        except BaseException:
            self.cancel(call)
            raise
        return call

    def cancel(self, call: Call) -> None:
        if call.left:
            self._release(call, call.left)
            self._inbox.put(lambda engine: self._drop(engine, call, "cancelled"))

    async def ask(self, question: Callable[[Served], T]) -> T:
        """The answer of the engine's own thread, between two steps."""
        self._check_well()
        answer: asyncio.Future[T] = self.promise()
        self._inbox.put(lambda engine: self._tell(_settle, answer, _answer(question, engine)))
        return await answer

    def abort(self, error: ApiError) -> None:
        """End every call under way with this error, whatever the engine is doing."""
        self._break(list(self._speaking), error)
        self._inbox.put(lambda engine: self._drop_all(engine, error))

    def promise(self) -> asyncio.Future[Any]:
        """What the engine's thread will answer, or be found to have failed before."""
        made = self._loop.create_future()
        self._promised.add(made)
        made.add_done_callback(self._promised.discard)
        return made

    def _check_well(self) -> None:
        if self.status == "failed":
            raise ApiError(503, FAILED)

    def _release(self, call: Call, count: int) -> None:
        call.left -= count
        self.under_way -= count
        self.owned[call.tenant] -= count
        if not self.owned[call.tenant]:
            del self.owned[call.tenant]
        if not call.left:
            self._speaking.discard(call)

    def _receive(self, batch: Sequence[tuple[Call, Said]]) -> None:
        for call, said in batch:
            if said.token.finish is not None and call.left:
                self._release(call, 1)
            call.put(said)

    def _fail(self, calls: Iterable[Call], error: ApiError) -> None:
        for call in calls:
            self._release(call, call.left)
            call.put(error)

    def _break(self, calls: Iterable[Call], error: ApiError) -> None:
        """Nobody answers any more."""
        self._fail(calls, error)
        for promised in list(self._promised):
            _settle(promised, ApiError(503, str(error)))

    # From here on: the engine's thread.

    def _main(self) -> None:
        try:
            engine = self._make()
            self.stats = engine.stats()
        except BaseException as error:
            self._tell(_settle, self._ready, error)
            return
        self._tell(_settle, self._ready, None)
        try:
            while self._running:
                self._obey(engine)
                if engine.busy and self._running:
                    self._step(engine)
                    self.tidy.worked()
                self._look(engine, not engine.busy)
                if isinstance(engine, Cluster):
                    self._tell_lost(engine)
                    if engine.failed:
                        raise RuntimeError(engine.problem)
        except BaseException as error:  # nothing is known of the engine any more: better none than a wrong one
            self._log("engine", error=error)
            self.status = "failed"
            self._tell(self._break, self._calls(), ApiError(500, FAILED))

    def _tell_lost(self, engine: Cluster) -> None:
        while engine.lost:
            self._log("process", lost=engine.lost.pop(0))
        self.status = "failed" if engine.failed else self.status

    def _look(self, engine: Served, now: bool) -> None:
        """Take the engine's report; while it works, only from time to time."""
        at = time.monotonic()
        if now or at - self._looked > LOOK_S:
            self.stats, self._looked = engine.stats(), at

    def _obey(self, engine: Served) -> None:
        """Run the commands that have come. Without work, wait for one, and then for the requests that are being read:
        those that come together begin together, since a step of all their prompts costs less than one for each."""
        idle, until = not engine.busy, 0.0
        while True:
            gathers = bool(self.coming) and time.monotonic() < until
            try:
                self._inbox.get(idle or gathers, TICK_S if gathers else self.tidy.patience)(engine)
            except Empty:
                if not idle and not gathers:
                    return
                if idle:
                    self.tidy.rested()
                continue
            if idle:
                idle, until = False, time.monotonic() + GATHER_S

    def _step(self, engine: Served) -> None:
        began = time.monotonic()
        try:
            tokens = engine.step()
        except Exception as error:
            self._log("engine", error=error)
            self._drop_all(engine, ApiError(500, "the engine failed in the middle of this reply"))
            return
        if isinstance(engine, Cluster):  # before a client hears of it
            self._tell_lost(engine)
        at = time.monotonic()
        self._note_starts(engine, tokens, began)
        self._look(engine, any(token.finish for token in tokens))  # before a client hears that it has ended
        if batch := [self._note(token, at) for token in tokens if token.request in self._open]:
            self._tell(self._receive, batch)

    def _note_starts(self, engine: Served, tokens: Sequence[Token], at: float) -> None:
        """Who has waited until the step that began at `at`."""
        fresh = {number: place for number, place in self._open.items() if not place.started}
        if not fresh:
            return
        jobs = engine.jobs.values() if isinstance(engine, Engine) else ()  # other processes tell of their first token
        running = {live.number for live in jobs if live.slot is not None}
        for number in fresh.keys() & (running | {token.request for token in tokens if token.id is not None}):
            fresh[number].started = True
            self._observer.started(at - fresh[number].call.began)

    def _note(self, token: Token, at: float) -> tuple[Call, Said]:
        place = self._open[token.request]
        if token.id is not None:
            self._observer.said(token, place.call.began, place.last.get(token.choice), at)
            place.last[token.choice] = at
        if token.finish == "error" and not is_grammars(token.why):
            self._log("reply", why=token.why)
        if token.finish is not None:
            self._observer.ended(token.finish)
            place.left -= 1
            if not place.left:
                del self._open[token.request]
        return place.call, Said(place.index, token, at)

    def _submit(self, engine: Served, call: Call) -> None:
        if call.accepted.done():  # the client has gone before its turn came
            return
        try:
            for index, request in enumerate(call.requests):
                self._open[engine.submit(request)] = _Open(call, index, request.n, {})
        except ValueError as error:
            self._drop(engine, call, "error")
            self._tell(_settle, call.accepted, ApiError(400, str(error)))
            return
        self._observer.submitted(call.requests)
        self._tell(_settle, call.accepted, None)

    def _drop(self, engine: Served, call: Call, outcome: Ending) -> None:
        for number in [number for number, place in self._open.items() if place.call is call]:
            place = self._open.pop(number)
            engine.cancel(number)
            for _ in range(place.left):
                self._observer.ended(outcome)

    def _drop_all(self, engine: Served, error: ApiError) -> None:
        for call in (calls := self._calls()):
            self._drop(engine, call, "error")
        self._tell(self._fail, calls, error)

    def _calls(self) -> list[Call]:
        return list({id(place.call): place.call for place in self._open.values()}.values())

    def _quit(self, engine: Served) -> None:
        self._running = False

    def _tell(self, heard: Callable[..., None], *what: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(heard, *what)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if future.done():
        return
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)


def _answer(question: Callable[[Served], T], engine: Served) -> T | Exception:
    try:
        return question(engine)
    except Exception as error:
        return error
