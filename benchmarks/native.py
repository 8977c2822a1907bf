"""What the compiled kernels gain: each against torch, and a model's whole decode step with and without them. Weights
of 8 and 4 bits stand beside torch's product of the same numbers in float32, since torch has none like theirs.

python benchmarks/native.py [CHECKPOINT] [--dtypes bf16,f32,int8,int4] [--rows 1,16,64,512] [--threads N] [--seconds S]

The floor of one row is a plain read: the same bytes as whole registers, summed and not multiplied, by as many threads.

In turns, so that a busy machine slows both alike. Seconds are the processor's with one thread (what others do on the
machine is not counted, beyond what they take of its memory), and the clock's with more. The fifth of the sorted times.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from assay.cli.common import in_dtype
from assay.measure.serving import Load, Serving
from assay.ops import native
from assay.ops.linear import linear
from assay.ops.native import build
from assay.ops.native.kernels import ROWS
from assay.ops.norm import rms_norm
from assay.ops.packed import Packed, held_bytes, pack
from assay.passes.quantise import DTYPES
from assay.train.checkpoint import load_checkpoint

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))  # SmolLM2-135M: [out, in]
FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}
FOOTPRINT = 64 << 20  # bytes of different weights: more than a cache holds
READ = r"""
#include <cstdint>
typedef int64_t Longs __attribute__((vector_size(64), may_alias));
extern "C" int64_t read_all(const Longs* from, long count) {
  int64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (long i = 0; i < count / 8; i++) {
    Longs some = {};
    for (int j = 0; j < 8; j++) {
      __builtin_prefetch(from + 8 * i + j + 64);
      some += from[8 * i + j];
    }
    sum += some[0] + some[1] + some[2] + some[3] + some[4] + some[5] + some[6] + some[7];
  }
  return sum;
}
"""


@contextmanager
def without() -> Iterator[None]:
    """Torch alone."""
    found, native.kernels = native.kernels, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.kernels = found


def alone(call: Callable[[], object]) -> Callable[[], None]:
    """The same without the kernels."""

    def run() -> None:
        with without():
            call()

    return run


def pair(call: Callable[[], object], other: Callable[[], object], budget_s: float) -> tuple[float, float]:
    """Seconds of both, in turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    mine: list[float] = []
    theirs: list[float] = []

    def timed(into: list[float], one: Callable[[], object]) -> None:
        start = clock()
        one()
        into.append(clock() - start)

    end = time.perf_counter() + budget_s
    with torch.inference_mode():
        call()
        other()
        while time.perf_counter() < end or len(mine) < 5:
            timed(mine, call)
            timed(theirs, other)
    return sorted(mine)[len(mine) // 5], sorted(theirs)[len(theirs) // 5]


def reader() -> Callable[[torch.Tensor], None]:
    """Reads a tensor once, line by line."""
    with tempfile.TemporaryDirectory() as folder:
        source, made, openmp = Path(folder) / "read.cpp", Path(folder) / "read.so", build.runtime()
        source.write_text(READ)
        command = [build.compiler(), *build.FLAGS, "-shared", str(source), "-o", str(made)]
        subprocess.run([*command, *([] if openmp is None else [str(openmp)])], check=True)
        read = ctypes.CDLL(str(made)).read_all
    read.argtypes, read.restype = (ctypes.c_void_p, ctypes.c_long), ctypes.c_int64

    def run(held: torch.Tensor) -> None:
        read(held.data_ptr(), held.numel() * held.element_size() // 64)

    return run


def every(read: Callable[[torch.Tensor], None], held: Sequence[torch.Tensor]) -> None:
    for one in held:
        read(one)


def told(name: str, found: tuple[float, float], note: str = "") -> None:
    mine, theirs = (1e6 * s for s in found)
    print(f"{name:44} {theirs:10.1f} -> {mine:10.1f} us  {theirs / mine:5.2f} times as fast  {note}", flush=True)


def products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        for w in weights:
            linear(x, w)

    return run


def kernels(name: str, rows: int, read: Callable[[torch.Tensor], None], budget_s: float) -> None:
    for out, size in SHAPES if rows <= ROWS else SHAPES[:3]:
        count = max(1, FOOTPRINT // (out * size * 4))
        floats = [torch.randn(out, size).to(FLOATS.get(name, torch.float32)) for _ in range(count)]
        weights = floats if name in FLOATS else [pack(w, DTYPES[name]) for w in floats]
        x = torch.randn(rows, size).to(floats[0].dtype)
        found = pair(products(x, weights), alone(products(x, floats)), budget_s)
        mine, theirs = (s / count for s in found)
        held = [w.codes if isinstance(w, Packed) else w for w in weights]
        plain = pair(partial(every, read, held), partial(every, read, held), budget_s / 2)[0] / count
        rates = f"{held_bytes(weights[0]) / mine / 1e9:.1f} GB/s, {2 * rows * out * size / mine / 1e9:.0f} GFLOP/s"
        rates += f"; a plain read takes {plain / mine:.0%} of it"
        told(f"linear {name} {rows} x {size} -> {out}", (mine, theirs), rates)


def norms(dtype: torch.dtype, rows: int, budget_s: float) -> None:
    x, w = torch.randn(rows, 576).to(dtype), torch.ones(576, dtype=dtype)
    call = lambda: rms_norm(x, w, 1e-5)  # noqa: E731
    told(f"rms_norm {str(dtype)[6:]} {rows} x 576", pair(call, alone(call), budget_s))


def step(source: Path, name: str, batch: int, budget_s: float) -> None:
    """Packed weights beside float32 ones without kernels."""
    load = Load(batch, 192, 64, read=128)
    models = [load_checkpoint(source, torch.device("cpu"))[0] for _ in range(2)]
    served = Serving(in_dtype(models[0], name), load)
    other = Serving(in_dtype(models[1], name if name in FLOATS else "f32"), load)
    found = pair(lambda: next(served.tokens)(), alone(lambda: next(other.tokens)()), budget_s)
    told(f"decode step {name} batch {batch}", found, f"{batch / found[0]:.1f} tokens/s, torch {batch / found[1]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--dtypes", default="bf16,f32,int8,int4")
    parser.add_argument("--rows", default="1,16,64,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if native.kernels() is None:
        raise SystemExit("no kernels: nothing to compare")
    read = reader()
    for name in given.dtypes.split(","):
        for rows in map(int, given.rows.split(",")):
            kernels(name, rows, read, given.seconds)
            if name in FLOATS and rows <= ROWS:
                norms(FLOATS[name], rows, given.seconds)
            if given.checkpoint is not None and rows <= ROWS:
                step(given.checkpoint, name, rows, 8 * given.seconds)


if __name__ == "__main__":
    main()
