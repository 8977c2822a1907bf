"""Who may ask, and how much at once: what stands before every route.

Without keys the server answers on a loopback address alone. There any web page in the user's browser could reach it, by
a name of its own that resolves to 127.0.0.1 (DNS rebinding) or by a form: so the Host header must name this machine, an
Origin must be this server, and a body must say that it is JSON, which no form can. There are no CORS headers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from assay.engine.server.config import ServerConfig, is_loopback
from assay.engine.server.errors import ApiError
from assay.engine.server.logs import Log

OPEN = frozenset({"/", "/health"})  # answered to everybody who passes the check of hosts, and while the model loads
METRICS = "/metrics"
WATCHED = OPEN | {METRICS}  # answered until the very end
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Gate:
    """Whether the server takes requests; `reason` says why not."""

    def __init__(self) -> None:
        self.reason: str | None = "the model is loading"

    def open(self) -> None:
        self.reason = None

    def close(self, reason: str) -> None:
        self.reason = reason


class Guard:
    """ASGI middleware. Leaves `tenant` (a digest of the key) and `log` (facts to log) in the request's state.

    coming: the tasks of requests whose bodies are here. Whoever passes one on to the engine takes it out.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        gate: Gate,
        log: Log,
        refused: Callable[[], None],
        coming: set[asyncio.Task[Any] | None],
    ) -> None:
        self.app, self.config, self.gate, self.log, self.refused = app, config, gate, log, refused
        self.coming = coming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(send)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = facts
        try:
            scope["state"]["tenant"] = self.check(scope)
            receive = await self.buffered(scope, receive)
            self.coming.add(asyncio.current_task())
            await self.app(scope, receive, visit.send)
        except ApiError as error:
            if not visit.status:
                await error.response()(scope, receive, visit.send)
        except Exception as error:
            self.log("defect", error, id=visit.id)
            if not visit.status:
                await ApiError(500, "the server failed on this request").response()(scope, receive, visit.send)
        finally:
            self.coming.discard(asyncio.current_task())
            if visit.status >= 400:
                self.refused()
            if scope["path"] not in WATCHED or visit.status >= 400:
                took = round(time.monotonic() - visit.began, 6)
                route = getattr(scope.get("route"), "path", None)
                self.log("request", id=visit.id, route=route, status=visit.status, total_s=took, **facts)

    def check(self, scope: Scope) -> str:
        """The tenant; ApiError for whoever may not ask, or not now."""
        headers, path, tenant = Headers(scope=scope), scope["path"], ""
        if self.config.keys is None:
            check_host(headers)
        elif path not in OPEN:
            tenant = check_key(
                headers.get("authorization", ""), self.readers() if path == METRICS else self.config.keys
            )
        if self.gate.reason is not None and path not in WATCHED:
            raise ApiError(503, self.gate.reason, retry=5)
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip() != JSON:
            raise ApiError(415, f"content-type: {headers.get('content-type')!r}; accepted: {JSON}")
        return tenant

    def readers(self) -> Collection[str]:
        """The keys that open the metrics."""
        if self.config.watchers is None and self.config.shared:
            raise ApiError(403, "metrics: they tell of every key; accepted: a key of --metrics-key-file")
        return self.config.watchers or self.config.keys or ()

    async def buffered(self, scope: Scope, receive: Receive) -> Receive:
        """The body, read whole; then what the connection has to say."""
        if scope["method"] != "POST":
            return receive
        limits = self.config.limits
        try:
            async with asyncio.timeout(limits.body_s):
                body = await read(receive, limits.body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.body_s:g} s") from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again


JSON = "application/json"


class Visit:
    """One request's answer as it goes out: its status, under headers that every answer has."""

    def __init__(self, send: Send) -> None:
        self.id, self.status, self.began = uuid.uuid4().hex[:16], 0, time.monotonic()
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in {**HEADERS, "x-request-id": self.id}.items():
                headers.setdefault(name, value)
        await self._send(message)


async def read(receive: Receive, limit: int) -> bytes:
    """A body of up to `limit` bytes. ApiError 413 for a longer one, as soon as that shows."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left before its body was complete")
        body += message.get("body", b"")
        if len(body) > limit:
            raise ApiError(413, f"the body is longer than {limit} bytes")
        if not message.get("more_body", False):
            return bytes(body)


def check_host(headers: Headers) -> None:
    """ApiError 403 where a browser was led here under another name, or by another site's page."""
    host = headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if not is_loopback(name):
        raise ApiError(403, f"host: {host!r}; accepted without keys: localhost, 127.0.0.1, [::1]")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise ApiError(403, f"origin: {origin!r}; accepted: pages of this server")


def check_key(header: str, keys: Collection[str]) -> str:
    """The tenant of a key. Every key is compared, each in constant time."""
    scheme, _, given = header.partition(" ")
    same = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in sorted(keys)]
    if scheme.lower() != "bearer" or not any(same):
        raise ApiError(401, "authorization: accepted: Bearer and a key of this server", code="invalid_api_key")
    return hashlib.sha256(given.strip().encode()).hexdigest()[:32]
