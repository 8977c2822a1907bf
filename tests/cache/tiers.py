"""Records for tests of the tiers, and a Redis of their own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

SHAPES = {"k": (torch.float32, (4, 2, 3)), "codes": (torch.uint8, (5,)), "half": (torch.bfloat16, (2, 2))}


def name(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def record(number: int) -> dict[str, Tensor]:
    """Tensors of `SHAPES` that differ from number to number."""
    k = torch.arange(24, dtype=torch.float32).view(4, 2, 3) + 100 * number
    codes = torch.arange(5, dtype=torch.uint8) + number
    return {"k": k, "codes": codes, "half": torch.full((2, 2), number, dtype=torch.bfloat16)}


def same(found: dict[str, Tensor] | None, number: int) -> bool:
    expected = record(number)
    return (
        found is not None and found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    )


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of a server on a socket in `folder`. Skips where there is no server or no client."""
    pytest.importorskip("redis", reason="the redis client is not installed: pip install 'assay[store]'")
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    socket = folder / "redis.sock"
    options = ("--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", str(folder))
    server = subprocess.Popen((program, *options), stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if socket.exists():
                break
            time.sleep(0.01)
        yield f"unix://{socket}"
    finally:
        server.kill()
        server.wait()
