"""A client's connection: uvicorn's, which bounds the length of a request's headers, with a bound on their time too."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Closed where the headers of a request have not arrived `head_s` seconds after the connection was made or their
    first byte came. Without that, whoever connects and says nothing would hold a connection for ever."""

    def __init__(self, *args: Any, head_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.head_s = head_s
        self._late: asyncio.TimerHandle | None = None

    @property
    def asking(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        if self.asking or self.timeout_keep_alive_task is not None:
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_s, self._close)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if not self.asking:
            self.transport.close()
