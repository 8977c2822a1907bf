"""Where the time of an optimiser step goes, and its MFU by operator.

python benchmarks/training.py [MODEL] [--batch 16] [--seq 256] [--dtype float32] [--threads N]
python benchmarks/training.py [MODEL] --recipe smoke   (a shipped recipe, as `assay train` would run its first steps)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from assay.measure.machine import SIZE, matmul_seconds, seconds
from assay.measure.training import bench_recipe
from assay.spec.load import load_model
from assay.train.learner import Learner
from assay.train.loop import check, dataset
from assay.train.precision import resolve
from assay.train.recipe import load_recipe
from assay.train.utilisation import train_flops_per_token

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="gpt-11m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recipe", help="a shipped one, with its own batch, length and precision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    if given.recipe and any(getattr(given, name) != parser.get_default(name) for name in ("batch", "seq", "dtype")):
        parser.error("--batch, --seq, --dtype: a recipe has its own; accepted: without --recipe")
    if given.steps < 1:
        parser.error(f"--steps: not {given.steps}; accepted: 1 and more")
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device("cpu")
    own = resolve(load_recipe(given.recipe), device) if given.recipe else None
    spec, recipe = load_model(given.model), own or bench_recipe(given.batch, given.seq, given.dtype)
    with tempfile.TemporaryDirectory() as cache:
        data = dataset(recipe, Path(cache))
        check(spec, recipe, data)
        learner = Learner(spec, recipe, data, device)
        steps, products, worked = [], [], []
        for step in range(given.steps):
            began = time.process_time()
            steps.append(seconds(lambda step=step: learner.step(step, 100), device))
            worked.append(time.process_time() - began)
            products.append(matmul_seconds(getattr(torch, recipe.precision), device, 0.0))
        with profile(activities=[ProfilerActivity.CPU]) as found:
            learner.step(given.steps, 100)
    flops = train_flops_per_token(spec, recipe.batch.length) * recipe.batch.tokens
    took, rate = min(steps), 2 * SIZE**3 / min(products)
    print(f"{recipe.batch.tokens / took:,.0f} tok/s in the best step")
    print(f"{1e3 * median(worked):.1f} ms of processor time in the median step")
    print(f"MFU {flops / took / rate:.1%} of {rate / 1e9:.0f} GFLOP/s, the best product of 2048 between the steps")
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    products = sum(row.self_cpu_time_total for row in rows if row.key in PRODUCTS)
    print(f"matrix products {products / total:.1%} of {total / 1e6:.2f} s")
    for row in rows[:16]:
        share, count = row.self_cpu_time_total / total, row.count
        print(f"{share:7.1%}  {row.self_cpu_time_total / 1e3:9.1f} ms  {count:5d} x  {row.key}")


if __name__ == "__main__":
    main()
