"""A GPT as one writes it in PyTorch, trained beside assay's in turns.

    python benchmarks/plain.py [--sizes gpt-11m,wide] [--rounds N] [--threads N] [--out runs/performance/training.json]

What is measured takes the place of the same size in the file. benchmarks/performance.py makes a table of it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from elsewhere import Elsewhere
from torch import Tensor, nn

from assay.measure.machine import SIZE, environment, matmul_seconds, seconds
from assay.measure.profile import by_torch
from assay.measure.training import bench_recipe
from assay.ops.precision import multiplies_bfloat16
from assay.spec.load import load_model
from assay.spec.model import ModelSpec
from assay.train.fit import check
from assay.train.learner import Learner
from assay.train.loop import dataset
from assay.train.utilisation import train_flops_per_token

WIDE = {"d_model": 768, "layers": 12, "blocks.block.mixer.heads": 12, "blocks.block.ffn.width": 3072, "context": 512}
SIZES: Mapping[str, tuple[str, dict[str, Any], int, int]] = {
    "gpt-11m": ("gpt-11m", {}, 16, 256),
    "wide": ("gpt-11m", WIDE, 2, 512),
}
"""A model, what is changed of it, rows of a batch and their tokens."""
PROFILED = 2  # steps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def precisions() -> list[str]:
    """Those that a model would be trained in on this CPU."""
    return list(DTYPES) if multiplies_bfloat16() else ["float32"]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.before(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Plain(nn.Module):
    """Learned positions, LayerNorm before, GELU, a tied head, no biases: shelf model gpt-11m."""

    def __init__(self, spec: ModelSpec, heads: int, context: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(spec.vocab, spec.d_model), nn.Embedding(context, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec.d_model, heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.d_model, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Training:
    """Steps of the plain model: fused AdamW, gradients clipped, in bfloat16 under autocast."""

    def __init__(self, spec: ModelSpec, batch: int, length: int, precision: str) -> None:
        self.dtype = DTYPES[precision]
        self.model = Plain(spec, spec.d_model // 64, length)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(spec.vocab, (batch, length + 1))

    def step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.model(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()

    def seconds(self) -> float:
        return seconds(self.step, torch.device("cpu"))


def beside(
    name: str, changes: dict[str, Any], batch: int, length: int, rounds: int, precision: str = "float32"
) -> dict[str, Any]:
    """Steps of both in turns, each in a process of its own, and the product of 2048 between them. MFU: of the fastest
    product, median steps. Then which operations our step's time goes to."""
    spec, recipe = load_model(name, changes), bench_recipe(batch, length, precision)
    device, took, products = torch.device("cpu"), dict[str, list[float]](assay=[], plain=[]), list[float]()
    with tempfile.TemporaryDirectory() as cache, Elsewhere(Training, spec, batch, length, precision) as plain:
        data = dataset(recipe, Path(cache))
        check(spec, recipe, data)
        learner = Learner(spec, recipe, data, device)
        for number in range(2 + 2 * rounds):
            took["assay"].append(seconds(lambda number=number: learner.step(number, 100), device))
            took["plain"].append(plain("seconds"))
            products.append(matmul_seconds(DTYPES[precision], device, 0.0))
        spent = by_torch(lambda: learner.step(2 + 2 * rounds, 100), PROFILED).rows("step", DTYPES[precision])
    steps = {who: median(found[2:]) for who, found in took.items()}
    flops, rate = train_flops_per_token(spec, length) * batch * length, 2 * SIZE**3 / min(products)
    spread = max((max(found[2:]) - min(found[2:])) / median(found[2:]) for found in took.values())
    return {
        "model": f"{name}, {spec.layers} x {spec.d_model} x {length}, {precision}",
        **{f"{who}_tok_s": batch * length / one for who, one in steps.items()},
        **{f"{who}_mfu": flops / one / rate for who, one in steps.items()},
        "ratio": steps["plain"] / steps["assay"],
        "spread": spread,
        "matmul_gflop_s": rate / 1e9,
        "profile": spent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/performance/training.json"))
    given = parser.parse_args()
    if unknown := set(given.sizes.split(",")) - set(SIZES):
        parser.error(f"--sizes: {', '.join(sorted(unknown))}; accepted: {', '.join(SIZES)}")
    torch.set_num_threads(given.threads)
    rows = json.loads(given.out.read_text("utf-8"))["rows"] if given.out.is_file() else []
    table = {row["model"]: row for row in rows}
    for name, precision in product(given.sizes.split(","), precisions()):
        row = beside(*SIZES[name], given.rounds, precision)
        print(json.dumps({key: value for key, value in row.items() if key != "profile"}), flush=True)
        table[row["model"]] = row
        found = {"machine": environment(), "threads": given.threads, "rows": list(table.values())}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found) + "\n", "utf-8")


if __name__ == "__main__":
    main()
