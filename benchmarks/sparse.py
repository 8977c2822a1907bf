"""Sparse attention by length: seconds of a forward pass, pairs that are visible and pairs that are multiplied, and the
powers they grow with.

python benchmarks/sparse.py [--lengths 2048 4096 8192 16384] [--rules strided fixed ...] [--threads 1] [--backward]

Two heads of 64 in float32, one sequence. The seconds are those of a step with one layer: what depends on the rule alone
is made anew each time, and blocks are weighed. `square` is full attention, and each rule once more with the square made
and masked, as far as its mask fits (`--masked`, up to 8,192 tokens).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from assay.ops.attend import Blocks, Scores, attend, executed_pairs, looked_into, plan
from assay.ops.sees import Sees
from assay.ops.step import Layout, View, rows_step

HEADS, DIM = 2, 64
MOST_MASKED = 8192
Rule = Sees | Blocks


def rules(length: int) -> dict[str, Rule]:
    """Strides, chunks and blocks at the root of the length; windows and what is looked into stay as they are."""
    root = round(math.sqrt(length))
    return {
        "square": Sees(),
        "strided": Sees(window=root, stride=root),
        "fixed": Sees(chunk=root, last=1),
        "window": Sees(window=128),
        "window, first 16": Sees(window=128, first=16),
        "band, 16 global": Sees(causal=False, band=(64, 64), first=16),
        "means of blocks": Blocks(by="mean", size=64, keep=8),
        "bounds of pages": Blocks(by="bounds", size=16, keep=32),
    }


class Work:
    """One layer's attention over one sequence."""

    def __init__(self, length: int, rule: Rule, backward: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        shapes = ((length, HEADS, DIM), (1, length, HEADS, DIM), (1, length, HEADS, DIM))
        self.q, self.k, self.v = (torch.randn(shape, generator=draw).requires_grad_(backward) for shape in shapes)
        self.step, self.rule, self.backward = rows_step(torch.zeros(1, length, dtype=torch.long)), rule, backward
        self.layout = Layout(self.step.seq[None], self.step.index[None], self.step.positions[None], True)

    def run(self, backend: str) -> None:
        view, sees = View({"k": self.k, "v": self.v}, self.layout), Sees()
        if isinstance(self.rule, Sees):
            sees = self.rule
            made = plan(self.step, self.layout, sees, backend)
        else:
            masked = None if backend == "auto" else plan(self.step, self.layout, sees, backend)
            found = looked_into(self.rule, masked, self.q, view, self.step, sees)
            made = found if found is not None else plan(self.step, self.layout, sees, backend)
        out: Tensor = attend(self.q, view, self.step, sees, Scores(DIM**-0.5), made)
        if self.backward:
            torch.autograd.grad(out.sum(), (self.q, self.k, self.v))

    def pairs(self) -> tuple[int, int]:
        """Visible, and multiplied."""
        length = len(self.q)
        if isinstance(self.rule, Sees):
            return self.rule.pairs(length, 0), executed_pairs(length, 0, self.rule)
        return self.rule.pairs(length, 0), self.rule.multiplied(length, 0)


def best(run: Callable[[], None], seconds: float) -> float:
    """The shortest of as many calls as fit."""
    found: list[float] = []
    while sum(found) < seconds or not found:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def slope(lengths: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def table(lengths: list[int], names: list[str], masked: bool, backward: bool, seconds: float) -> list[str]:
    head = ["rule", *(f"{n:,}" for n in lengths), "s", "multiplied", "visible"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in names:
        for backend in ("auto", "matmul") if masked and name != "square" else ("auto",):
            at = [n for n in lengths if backend == "auto" or n <= MOST_MASKED]
            works = [Work(n, rules(n)[name], backward) for n in at]
            with torch.set_grad_enabled(backward):
                taken = [best(lambda: work.run(backend), seconds) for work in works]  # noqa: B023
            counted = [work.pairs() for work in works]
            fits = [slope(at, list(x)) for x in (taken, *zip(*((m, v) for v, m in counted), strict=True))]
            cells = [f"{1e3 * t:.0f}" for t in taken] + [""] * (len(lengths) - len(at))
            told = [f"{fits[0]:.2f}", "" if backend == "matmul" else f"{fits[1]:.2f}", f"{fits[2]:.2f}"]
            row = [name if backend == "auto" else f"{name}, masked", *cells, *told]
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--rules", nargs="+", default=list(rules(1024)), choices=list(rules(1024)))
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--backward", action="store_true", help="both passes")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lines = table(given.lengths, given.rules, given.masked, given.backward, given.seconds)
    print("\n".join(["", *lines, "", "Milliseconds by length, then the powers they and the pairs grow with."]))


if __name__ == "__main__":
    main()
