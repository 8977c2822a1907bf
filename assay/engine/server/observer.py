"""Who is told what a server's engine does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from assay.engine.request import Request
from assay.engine.runner import Token


class Observer(Protocol):
    """Who is told what happens, in the engine's thread."""

    def submitted(self, requests: Sequence[Request]) -> None: ...
    def started(self, waited: float) -> None: ...
    def said(self, token: Token, began: float, last: float | None, at: float) -> None: ...
    def ended(self, outcome: str) -> None: ...
