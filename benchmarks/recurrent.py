"""Recurrent mixers beside attention: training in chunks and token by token, and decoding by the length of the context.

python benchmarks/recurrent.py [--threads N] [--batch 2] [--rounds 2] [--contexts 128 2048 16384] [--page PAGE]

Models are gpt-11m with its mixer changed. Prints a Markdown table and writes it between the marks of docs/recurrent.md.
All numbers are medians; models take turns, so that a busy machine slows all alike. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from assay.measure.machine import cpu_name
from assay.measure.serving import Load, Serving
from assay.measure.training import bench_recipe, utilisation
from assay.model.lm import build
from assay.ops.lanes import Lanes
from assay.ops.scan import decayed, delta
from assay.spec.load import load_model
from assay.spec.model import ModelSpec

MIXERS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"kind": "gqa", "heads": 6, "position": "learned"},
    "Mamba-2": {"kind": "mamba2"},
    "Gated DeltaNet": {"kind": "gated_deltanet", "heads": 6},
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "recurrent.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
CPU = torch.device("cpu")
TRAINED, STEPS = 1024, 3
NEW, CALLS = 64, 10  # each call decodes five tokens and tells the times of four


def model(mixer: str, context: int, layers: int = 6) -> ModelSpec:
    return load_model("gpt-11m", {"context": context, "layers": layers, "blocks.*.mixer": dict(MIXERS[mixer])})


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, past: Tensor, lanes: Lanes, chunk: int
) -> tuple[Tensor, None]:
    """`decayed` of training, computed as its definition: one token after another."""
    heads = v.shape[2]
    q, k = decayed.shared(q, heads), decayed.shared(k, heads)
    return decayed.recurrent(q, k, v, log_decay[..., None].expand(*v.shape[:3], q.shape[-1]), past, lanes)[0], None


@contextmanager
def token_by_token() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch.object(decayed, "decayed", one_by_one))
        stack.enter_context(patch.object(delta, "chunkwise", delta.recurrent))
        yield


def step_seconds(spec: ModelSpec, batch: int, steps: int) -> tuple[float, ...]:
    return utilisation(spec, bench_recipe(batch, TRAINED, "float32"), CPU, steps).step_s


def training(batch: int, rounds: int) -> dict[str, float]:
    """Seconds of an optimiser step of each model."""
    times: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
    for _ in range(rounds):
        for mixer, found in times.items():
            found += step_seconds(model(mixer, TRAINED), batch, STEPS)
    return {mixer: median(found) for mixer, found in times.items()}


def gains() -> dict[str, float]:
    """How much faster a step of one layer and one row is in chunks than token by token. Six layers would keep 10 GB of
    states; their gain is larger, since the embedding, the head and the optimiser count once."""
    found = {}
    for mixer in tuple(MIXERS)[1:]:
        spec = model(mixer, TRAINED, layers=1)
        chunks = median(step_seconds(spec, 1, STEPS))
        with token_by_token():
            found[mixer] = median(step_seconds(spec, 1, 1)) / chunks
    return found


def decoding(contexts: Sequence[int]) -> dict[str, list[float]]:
    """Seconds of a token of one sequence behind each context."""
    loads = {}
    for mixer in MIXERS:
        lm = build(model(mixer, max(contexts) + NEW), 0, CPU)
        loads[mixer] = [Serving(lm, Load(1, context + NEW, NEW)) for context in contexts]
    gaps: dict[Serving, list[float]] = {load: [] for row in loads.values() for load in row}
    for _ in range(CALLS):
        for load, found in gaps.items():
            found += load.decode()
    return {mixer: [median(gaps[load]) for load in row] for mixer, row in loads.items()}


def table(batch: int, rounds: int, contexts: Sequence[int]) -> list[str]:
    steps, gain, gaps = training(batch, rounds), gains(), decoding(contexts)
    places = [f"ms a token behind {context:,}" for context in contexts]
    head = ["", "training tok/s", "step / attention's", "in chunks / by token", *places, "last / first"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for mixer, step in steps.items():
        by_token = f"{gain[mixer]:.0f}x" if mixer in gain else ""
        times = [f"{1e3 * gap:.2f}" for gap in gaps[mixer]]
        ratio = f"{step / steps['attention']:.2f}"
        flat = f"{gaps[mixer][-1] / gaps[mixer][0]:.2f}"
        rows.append([mixer, f"{batch * TRAINED / step:,.0f}", ratio, by_token, *times, flat])
    about = (
        f"6 layers of 384, float32, {torch.get_num_threads()} threads of {cpu_name()}, torch {torch.__version__}. "
        f"Training: {batch} x {TRAINED:,} tokens a step, medians of {rounds * STEPS} steps. Decoding: one sequence, "
        f"medians of {4 * CALLS} tokens."
    )
    return ["| " + " | ".join(row) + " |" for row in rows] + ["", about]


def write(page: Path, lines: Sequence[str]) -> None:
    """Between the marks of the page. ValueError for a page without them."""
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: accepted: a page with the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 16384])
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    lines = table(given.batch, given.rounds, given.contexts)
    print("\n".join(lines))
    write(given.page, lines)


if __name__ == "__main__":
    main()
