"""A step on a CUDA device captured once and run again: what `ops.tape` is on a CPU, with its interface.

torch does the capturing (`torch.cuda.graph`): a captured call computes nothing yet, and each run computes it on the
tensors it was captured with. Not run on hardware from here: without a GPU its tests are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from assay.ops.tape import Unrecordable

T = TypeVar("T")


class Replay(Protocol):
    """A step again, on the tensors it was recorded with; its results are where they were. held: bytes of its own."""

    held: int

    def run(self) -> None: ...

    def timed(self) -> list[tuple[str, float]]:
        """The same, and the seconds of what it is made of, by name."""


class Graph:
    """A captured CUDA graph. What its pool holds is not asked for: more than anybody allows."""

    held = 1 << 62

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def run(self) -> None:
        self._graph.replay()

    def timed(self) -> list[tuple[str, float]]:
        """The whole of it: what is inside is for a profiler of the device."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run()
        torch.cuda.synchronize()
        return [("cuda::graph", time.perf_counter() - start)]


def captured(call: Callable[[], T]) -> tuple[T, Graph]:
    """What `call` returns, which no run has computed yet, and its graph. The call must have been made once before, so
    that libraries are loaded and kernels compiled. Unrecordable where it waits for the device or does anything else
    that cannot be captured: then it has not been computed."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = call()
    except RuntimeError as error:
        raise Unrecordable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    return out, Graph(graph)
