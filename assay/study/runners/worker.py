"""One worker process: takes trials from a pipe until the pipe or its parent is gone."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Progress = dict[str, Any]
RunTrial = Callable[[dict[str, Any], Callable[[Progress], None]], list[dict[str, Any]]]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MIN_PROGRESS_GAP_S = 0.1


def import_function(path: str) -> RunTrial:
    """`package.module:name` -> the function; ValueError where there is none."""
    module, _, name = path.partition(":")
    try:
        function: RunTrial = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"trial function {path!r}: {error}; accepted: package.module:function") from None
    return function


def work(pipe: Connection, function: str, threads: int) -> None:
    """The process's main function. Messages out: (kind, payload), kind one of ready, progress, done, failed."""
    # Ctrl-C reaches the whole group: the parent decides, so that no worker dies in the middle of a message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        run = import_function(function)
        # The environment comes too late for a torch that the main module already imported.
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            pipe.send(_outcome(run, job, pipe))
    except (EOFError, BrokenPipeError):
        return
    except ValueError as error:
        pipe.send(("broken", str(error)))


def _outcome(run: RunTrial, job: dict[str, Any], pipe: Connection) -> tuple[str, Any]:
    last = 0.0

    def progress(event: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= MIN_PROGRESS_GAP_S:
            last = time.monotonic()
            pipe.send(("progress", event))

    try:
        return "done", run(job, progress)
    except MemoryError:
        return "failed", "out of memory"
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _die_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
