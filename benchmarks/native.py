"""What the compiled kernels gain: each against torch, and a model's whole decode step with and without them.

python benchmarks/native.py [CHECKPOINT] [--threads N] [--seconds S]

In turns, so that a busy machine slows both alike. Seconds are the processor's with one thread (what others do on the
machine is not counted, beyond what they take of its memory), and the clock's with more. The fifth of the sorted times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from assay.measure.serving import Load, Serving
from assay.ops import native
from assay.ops.linear import linear
from assay.ops.norm import rms_norm
from assay.train.checkpoint import load_checkpoint

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))  # SmolLM2-135M: [out, in]
FOOTPRINT = 64 << 20  # bytes of different weights: more than a cache holds


@contextmanager
def without() -> Iterator[None]:
    """Torch alone."""
    found, native.kernels = native.kernels, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.kernels = found


def pair(call: Callable[[], object], budget_s: float) -> tuple[float, float]:
    """Seconds with the kernels and without them."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    mine: list[float] = []
    theirs: list[float] = []

    def timed(into: list[float]) -> None:
        start = clock()
        call()
        into.append(clock() - start)

    end = time.perf_counter() + budget_s
    with torch.inference_mode():
        call()
        while time.perf_counter() < end or len(mine) < 5:
            timed(mine)
            with without():
                timed(theirs)
    return sorted(mine)[len(mine) // 5], sorted(theirs)[len(theirs) // 5]


def told(name: str, found: tuple[float, float], note: str = "") -> None:
    mine, theirs = (1e6 * s for s in found)
    print(f"{name:44} {theirs:10.1f} -> {mine:10.1f} us  {theirs / mine:5.2f} times as fast  {note}", flush=True)


def kernels(dtype: torch.dtype, rows: int, budget_s: float) -> None:
    name = str(dtype).removeprefix("torch.")
    for out, size in SHAPES:
        count = max(1, FOOTPRINT // (out * size * dtype.itemsize))
        weights = [torch.randn(out, size).to(dtype) for _ in range(count)]
        x = torch.randn(rows, size).to(dtype)

        def products(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
            for w in weights:
                linear(x, w)

        mine, theirs = (s / count for s in pair(products, budget_s))
        rates = f"{out * size * dtype.itemsize / mine / 1e9:.1f} GB/s, {2 * rows * out * size / mine / 1e9:.0f} GFLOP/s"
        told(f"linear {name} {rows} x {size} -> {out}", (mine, theirs), rates)
    x, w = torch.randn(rows, 576).to(dtype), torch.ones(576, dtype=dtype)
    told(f"rms_norm {name} {rows} x 576", pair(lambda: rms_norm(x, w, 1e-5), budget_s))


def step(source: Path, dtype: torch.dtype, batch: int, budget_s: float) -> None:
    model, _, _ = load_checkpoint(source, torch.device("cpu"))
    served = Serving(model.to(dtype), Load(batch, 192, 64, read=128))
    found = pair(lambda: next(served.tokens)(), budget_s)
    name = str(dtype).removeprefix("torch.")
    told(f"decode step {name} batch {batch}", found, f"{batch / found[0]:.1f} tokens/s, torch {batch / found[1]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if native.kernels() is None:
        raise SystemExit("no kernels: nothing to compare")
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 16):
            kernels(dtype, rows, given.seconds)
            if given.checkpoint is not None:
                step(given.checkpoint, dtype, rows, 8 * given.seconds)


if __name__ == "__main__":
    main()
