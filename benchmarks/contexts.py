"""A decoded token's time against the context, beside the bytes that it reads: attention, windows, latents, a state.

    python benchmarks/contexts.py [--contexts 256,1024,4096] [--threads N] [--out runs/performance/contexts.json]

Models are gpt-11m with its mixer changed, in float32, one sequence, in turns; medians. Bytes are the bill's: of weights
and of state. benchmarks/performance.py makes a table of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from assay.cost.bill import Question, Sheet
from assay.measure.machine import environment
from assay.measure.serving import Load, Serving
from assay.model.lm import build
from assay.spec.load import load_model

NEW, CALLS = 64, 12  # each call decodes five tokens and tells the times of four
MIXERS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"kind": "gqa", "heads": 6, "position": "learned"},
    "a window of 256": {"kind": "gqa", "heads": 6, "position": "learned", "sees": {"window": 256}},
    "latents of 128": {
        "kind": "mla", "heads": 6, "kv_rank": 128, "nope_dim": 64, "rope_dim": 32, "value_dim": 64,
    },
    "a state (Mamba-2)": {"kind": "mamba2"},
}  # fmt: skip


def measured(contexts: Sequence[int]) -> dict[str, Any]:
    loads: dict[str, list[Serving]] = {}
    read: dict[str, list[int]] = {}
    for name, mixer in MIXERS.items():
        spec = load_model("gpt-11m", {"context": max(contexts) + NEW, "layers": 4, "blocks.*.mixer": dict(mixer)})
        lm, sheet = build(spec), Sheet(spec)
        loads[name] = [Serving(lm, Load(1, context + NEW, NEW)) for context in contexts]
        asks = [Question(context, dtype="f32", kv_dtype="f32") for context in contexts]
        read[name] = [sheet.state_bytes_read(ask) for ask in asks]
    gaps: dict[Serving, list[float]] = {load: [] for row in loads.values() for load in row}
    for _ in range(CALLS):
        for load, found in gaps.items():
            found += load.decode()
    times = {name: [median(gaps[load]) for load in row] for name, row in loads.items()}
    return {"contexts": list(contexts), "seconds": times, "state_bytes_read": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="256,1024,4096")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/performance/contexts.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {
        "machine": environment(),
        "threads": given.threads,
        **measured([int(n) for n in given.contexts.split(",")]),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found) + "\n", "utf-8")
    print(json.dumps(found["seconds"]))


if __name__ == "__main__":
    main()
