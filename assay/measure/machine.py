"""What this machine can do: rates measured once a process, and its description."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.ops import onednn
from assay.train.precision import native_bfloat16

SIZE = 2048
BUFFER = 256 << 20
SMALLEST = 1 << 20
QUEUED = 50
"""Calls between two waits for an accelerator, where a wait takes as long as a product."""
CPUINFO, LIMIT = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/memory.max")


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call by the clock, the device idle before and after."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def best(call: Callable[[], object], device: torch.device, budget_s: float = 0.1) -> float:
    """The shortest of some calls: two of them, and more while the budget lasts."""
    found: list[float] = []
    while len(found) < 2 or sum(found) < budget_s:
        found.append(seconds(call, device))
    return min(found)


def matmul_flop_s(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOPs a second of a square matrix product of 2048 in this dtype, with the threads of now."""
    return _matmul(dtype, torch.device(device).type, torch.get_num_threads())


@cache
def _matmul(dtype: torch.dtype, kind: str, threads: int) -> float:
    return 2 * SIZE**3 / matmul_seconds(dtype, torch.device(kind))


def matmul_seconds(dtype: torch.dtype, device: torch.device, budget_s: float = 0.4) -> float:
    """The best time of the product of 2048, measured now: two of them, and more while the budget lasts."""
    a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty(SIZE, SIZE, device=device, dtype=dtype)
    again = 1 if device.type == "cpu" else QUEUED

    def products() -> None:
        for _ in range(again):
            torch.mm(a, b, out=out)

    def others() -> None:
        onednn.product(a, b)

    found = best(products, device, budget_s) / again
    return min(found, best(others, device, budget_s)) if device.type == "cpu" and onednn.serves(a, b, None) else found


def memory_byte_s(count: int = BUFFER, device: torch.device | str = "cpu") -> float:
    """Bytes a second that reading `count` bytes again and again reaches, with the threads of now.

    What fits into a cache is read faster than what does not, so a small model is held against the rate of its own size
    (rounded up to a power of two, at least 1 MiB, at most 256 MiB).
    """
    size = min(max(SMALLEST, 1 << (max(1, count) - 1).bit_length()), BUFFER)
    return _reading(size, torch.device(device).type, torch.get_num_threads())


@cache
def _reading(size: int, kind: str, threads: int) -> float:
    device = torch.device(kind)
    matrix = torch.ones(size // 4096, 1024, device=device)
    vector = torch.ones(1024, device=device)
    into = torch.empty(size // 4096, device=device)
    again = max(1, (16 << 20) // size) * (1 if device.type == "cpu" else QUEUED)

    def products() -> None:
        for _ in range(again):
            torch.mv(matrix, vector, out=into)

    def sums() -> None:
        for _ in range(again):
            matrix.sum()

    return again * size / min(best(products, device), best(sums, device))


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Values of a study's `environment` Result."""
    place = torch.device(device)
    precision = "bfloat16" if native_bfloat16(place.type) else "float32"
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": precision,
        "bf16_matmul_gflop_s": round(matmul_flop_s(torch.bfloat16, place) / 1e9, 1),
        "f32_matmul_gflop_s": round(matmul_flop_s(torch.float32, place) / 1e9, 1),
        "memory_gb_s": round(memory_byte_s(BUFFER, place) / 1e9, 2),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    lines = CPUINFO.read_text("utf-8", "replace").splitlines() if CPUINFO.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the machine, or of the control group where that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = LIMIT.read_text("ascii").strip() if LIMIT.is_file() else "max"
    return total if limit == "max" else min(total, int(limit))


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
