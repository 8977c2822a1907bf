"""Tiers one below the other: asked in order, filled behind the caller's back."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

from torch import Tensor

from assay.cache.tiers.record import Shapes, Tensors
from assay.cache.tiers.tier import Tier


class Tiers:
    """The nearest tier first. `get` asks in this thread; what a far one has is put into the nearer ones. `put` copies
    and returns: a thread of its own writes, up to `behind` records wait for it, and what comes then is not kept, for a
    slow disk must not slow a decode. `close` waits until all is written.
    """

    def __init__(self, levels: Sequence[Tier], behind: int = 64) -> None:
        if not levels or behind < 1:
            raise ValueError(f"cache tiers: {len(levels)} tiers, behind={behind}; accepted: 1 or more of both")
        self.levels = tuple(levels)
        self.dropped = self.failed = 0
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._queue: queue.Queue[tuple[str, int] | None] = queue.Queue(behind)
        self._alone = threading.Lock()
        self._writer = threading.Thread(target=self._work, name="assay-cache-tiers", daemon=True)
        self._writer.start()

    def get(self, name: str, shapes: Shapes) -> dict[str, Tensor] | None:
        """The record from the nearest tier that has it, on the host; not to be changed."""
        with self._alone:
            waiting = self._waiting.get(name)
        if waiting is not None:
            return dict(waiting)
        for depth, level in enumerate(self.levels):
            found = level.get(name, shapes)
            if found is not None:
                self._enqueue(name, found, depth)
                return found
        return None

    def put(self, name: str, tensors: Tensors) -> bool:
        """Into all tiers, soon; whether there was room to wait. The tensors may change afterwards."""
        return self._enqueue(name, tensors, len(self.levels), copy=True)

    def _enqueue(self, name: str, tensors: Tensors, depth: int, copy: bool = False) -> bool:
        """For the first `depth` tiers."""
        if depth == 0:
            return True
        with self._alone:
            if name in self._waiting:
                return True
            if self._queue.full():
                self.dropped += 1
                return False
            self._waiting[name] = {k: t.detach().to("cpu", copy=copy) for k, t in tensors.items()}
            self._queue.put_nowait((name, depth))
        return True

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            name, depth = task
            try:
                for level in self.levels[:depth]:
                    level.put(name, self._waiting[name])
            except Exception:  # a record that cannot be written is lost, and the thread goes on with the others
                self.failed += 1
            with self._alone:
                del self._waiting[name]
            self._queue.task_done()
        self._queue.task_done()

    def flush(self) -> None:
        """Wait until everything that was put is in the tiers."""
        self._queue.join()

    def report(self) -> dict[str, dict[str, int]]:
        """The counts of each tier, nearest first, and of what waits."""
        found = {f"{i}.{type(t).__name__}": t.stats() for i, t in enumerate(self.levels)}
        return found | {"behind": {"waiting": len(self._waiting), "dropped": self.dropped, "failed": self.failed}}

    def close(self) -> None:
        self._queue.put(None)
        self._writer.join()
        for level in self.levels:
            level.close()
