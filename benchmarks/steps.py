"""A log of this engine at work, for `assay simulate --check`: every step's work and time, every request's times.

python benchmarks/steps.py LOG.jsonl [MODEL] [--seconds 40] [--rate 3]     (one thread; random weights, drawn requests)

Poisson arrivals, four short prompts with long replies to one the other way round, served in real time by one engine in
this process. Then: `assay simulate --check LOG.jsonl --policy chunked --budget 512 --max-running 32 --capacity TOKENS`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from apart import engine, requests

from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Request
from assay.spec.load import load_model


def serve(source: Engine, load: list[tuple[float, Request]]) -> list[dict[str, Any]]:
    """The lines of the log: requests come at their times, whatever the engine does."""
    coming, began = list(load), time.perf_counter()
    asked, rows = dict[int, dict[str, Any]](), list[dict[str, Any]]()
    while coming or source.busy:
        now = time.perf_counter() - began
        while coming and coming[0][0] <= now:
            at, request = coming.pop(0)
            asked[source.submit(request)] = {"arrival": at, "prompt": len(request.prompt), "new": request.max_new}
        if not source.busy:
            time.sleep(max(0.0, coming[0][0] - now))
            continue
        before = time.perf_counter()
        said, now = source.step(), time.perf_counter() - began
        for token in said:
            asked[token.request].setdefault("ttft", now - asked[token.request]["arrival"])
            asked[token.request]["done"] = now
        last = source.last
        assert last is not None
        step = {"prefill_tokens": last.prompt, "decodes": last.decodes}
        context = last.context - last.prompt - last.decodes
        rows.append({**step, "context": context, "seconds": time.perf_counter() - before})
    return [*rows, *asked.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("model", nargs="?", default="llama-11m")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_model(given.model)
    source = engine(given.model, EngineConfig(max_running=32, prefix=False))
    load = requests(spec.vocab, spec.context, given.seconds, given.rate)
    serve(source, load[:5])  # the first steps of a process are slow
    rows = serve(source, load)
    given.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{given.model}: {len(load)} requests, {len(rows) - len(load)} steps, capacity {source.tokens}")


if __name__ == "__main__":
    main()
