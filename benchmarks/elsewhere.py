"""A peer in a process of its own: how assay asks for memory and threads is not how it does."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class Elsewhere:
    """What `make(*args)` makes, in another process with as many threads; called with the name of a method. Leave it by
    `with`."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, other = context.Pipe()
        given = (other, torch.get_num_threads(), make, args)
        self._process = context.Process(target=answered, args=given, daemon=True)
        self._process.start()
        other.close()

    def __call__(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        return self._pipe.recv()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()
        self._process.join()


def answered(pipe: Connection, threads: int, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    made = make(*args)
    while True:
        try:
            name, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(made, name)(*given))
