"""A server under load: the process it runs in, and when the tokens of its replies came. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Heard:
    """One reply as its client heard it: sent and at are seconds of one clock, at the moments that brought tokens.

    tokens: how many there were; a server may bring several at one moment.
    """

    sent: float
    at: tuple[float, ...]
    tokens: int

    @property
    def first_s(self) -> float:
        return self.at[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [late - early for early, late in zip(self.at, self.at[1:])]


def summary(replies: Sequence[Heard]) -> dict[str, float]:
    """Tokens a second from the first request sent to the last token heard, and percentiles over requests and gaps."""
    if not replies or not all(reply.at for reply in replies):
        raise ValueError("replies: at least one, each with a token")
    took = max(reply.at[-1] for reply in replies) - min(reply.sent for reply in replies)
    first, gaps = [reply.first_s for reply in replies], [gap for reply in replies for gap in reply.gaps] or [0.0]
    return {
        "output_tok_s": sum(reply.tokens for reply in replies) / took,
        "ttft_s_p50": float(np.percentile(first, 50)),
        "ttft_s_p99": float(np.percentile(first, 99)),
        "itl_ms_p50": 1e3 * float(np.percentile(gaps, 50)),
        "itl_ms_p99": 1e3 * float(np.percentile(gaps, 99)),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope over all pairs of points (Theil 1950, Sen 1968): a few outliers do not move it. 0 for one."""
    pairs = [(a, b) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] != a[0]]
    return float(np.median([(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs])) if pairs else 0.0


def gauges(page: str) -> dict[str, float]:
    """The samples of a page in Prometheus' text format, by name and labels as they stand there."""
    lines = (line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


class Process:
    """A server as a child process, its stderr in `log`. It stands once GET `health` answers 200."""

    def __init__(self, command: Sequence[str], health: str, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.health, self.log = health, log
        with log.open("ab") as file:
            self.child = subprocess.Popen(
                list(command), stdout=subprocess.DEVNULL, stderr=file, env={**os.environ, **(env or {})}
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()

    def wait(self, seconds: float) -> float:
        """Seconds until it stood. RuntimeError with the end of its log where it ends before, or never does."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.child.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.child.returncode}: {self._tail()}")
            if self._stands():
                return time.monotonic() - began
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready after {seconds:g} s: {self._tail()}")

    def end(self, number: int = signal.SIGTERM) -> None:
        self.child.send_signal(number)

    def status(self, seconds: float) -> int | None:
        """Its exit status; None where it still runs after so long."""
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def resident_bytes(self) -> int:
        """Memory that it has in RAM (Linux)."""
        return int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]) * PAGE_BYTES

    def _stands(self) -> bool:
        try:
            with urllib.request.urlopen(self.health, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _tail(self) -> str:
        return self.log.read_text("utf-8", "replace")[-2000:]


def usage(event: Mapping[str, Any]) -> int | None:
    """Tokens of the reply by a streamed event's own count; None where it has none."""
    found = event.get("usage")
    return None if not found else int(found["completion_tokens"])
