"""Forward and backward of causal attention: `matmul` and `tiled` beside torch's fused attention and the naive product.

python benchmarks/attention.py [--threads 1 2] [--dtype float32 bfloat16] [--repeats 30]

Times are medians of interleaved runs, so that a busy machine slows all columns alike; ratios are to the fused kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from assay.ops.attend import Scores, attend, plan
from assay.ops.sees import Sees
from assay.ops.state import step_layout
from assay.ops.step import View, rows_step

SHAPES = ((16, 6, 256, 64), (4, 2, 128, 32), (8, 4, 128, 16), (1, 9, 512, 64))


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    z = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return z.softmax(-1) @ v


def candidates(
    shape: tuple[int, int, int, int], dtype: torch.dtype, backends: tuple[str, ...]
) -> Mapping[str, Callable[[], object]]:
    """One training step of attention, as a layer runs it: tokens first in, tokens first out."""
    rows, heads, tokens, size = shape
    q, k, v = (torch.randn(rows * tokens, heads, size, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(rows * tokens, heads, size, dtype=dtype)
    step = rows_step(torch.zeros(rows, tokens, dtype=torch.long))
    layout, rule = step_layout(step), Scores(size**-0.5)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def heads_first(x: Tensor) -> Tensor:
        return x.view(rows, tokens, heads, size).transpose(1, 2)

    def trained(out: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out(), (q, k, v), upstream)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(rows * tokens, heads, size)

    def fused() -> Tensor:
        return flat(F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), is_causal=True))

    def ours(backend: str) -> Callable[[], Tensor]:
        made = plan(step, layout, Sees(), backend)
        grid = (rows, tokens, heads, size)
        return lambda: attend(q, View({"k": k.view(grid), "v": v.view(grid)}, layout), step, Sees(), rule, made)

    table = {
        "fused": trained(fused),
        "naive": trained(lambda: flat(naive(heads_first(q), heads_first(k), heads_first(v), mask))),
    }
    return table | {name: trained(ours(name)) for name in backends}


def medians(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--backends", nargs="+", default=["matmul"], choices=["matmul", "tiled", "sdpa"])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    print(
        f"{'threads':>7} {'dtype':>9} {'B, H, T, K':>18} {'fused ms':>9} {'naive':>7} "
        + " ".join(f"{b:>7}" for b in options.backends)
    )
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtype:
            for shape in SHAPES:
                found = medians(candidates(shape, getattr(torch, dtype), tuple(options.backends)), options.repeats)
                base = found.pop("fused")
                ratios = " ".join(f"{t / base:7.2f}" for t in found.values())
                print(f"{threads:>7} {dtype:>9} {shape!s:>18} {base * 1e3:9.2f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
