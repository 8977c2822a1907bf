"""Replies beside long prompts: gaps between tokens when one process does both, takes prompts in chunks, when two share
the requests, and when one process reads and one goes on. All behind the same front, in turns, on the same requests.

python benchmarks/apart.py [MODEL] [--seconds 20] [--rounds 2] [--json]      (one thread a process; random weights)
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import numpy as np
import torch

from assay.data.corpora import Corpus, Documents
from assay.data.tokenizers import Tokenizer, TokenizerSpec, build_tokenizer
from assay.engine.apart.cluster import Cluster
from assay.engine.apart.router import ClusterConfig
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Request, SamplingParams
from assay.model.lm import build
from assay.spec.load import load_model

ARMS: dict[str, tuple[ClusterConfig, dict[str, str | int]]] = {
    "whole prompts": (ClusterConfig(replicas=1), {"policy": "prefill_first", "chunk": 4096, "budget": 4096}),
    "chunks of 64": (ClusterConfig(replicas=1), {"chunk": 64, "budget": 64}),
    "two replicas": (ClusterConfig(replicas=2), {"chunk": 64, "budget": 64}),
    "1 reads, 1 goes on": (ClusterConfig(route="apart"), {"chunk": 4096, "budget": 4096}),
}
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Run:
    """Times of one arm: gaps within replies, first tokens after their requests, tokens, seconds in all."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def row(self) -> dict[str, float]:
        gaps, firsts = 1e3 * np.array(self.gaps), 1e3 * np.array(self.firsts)
        return {
            "itl_ms_p50": float(np.percentile(gaps, 50)),
            "itl_ms_p99": float(np.percentile(gaps, 99)),
            "itl_ms_max": float(gaps.max()),
            "ttft_ms_p50": float(np.percentile(firsts, 50)),
            "ttft_ms_p99": float(np.percentile(firsts, 99)),
            "tok_s": self.tokens / self.seconds,
        }


def letters() -> Tokenizer:
    return build_tokenizer(TokenizerSpec(), Corpus(Documents((), str), Documents((), str)))


def engine(model: str, config: EngineConfig) -> Engine:
    torch.set_num_threads(1)
    return Engine(build(load_model(model)), letters(), config)


def requests(vocab: int, context: int, seconds: float, rate: float) -> list[tuple[float, Request]]:
    """Poisson arrivals, by time: of five, four are short prompts with long replies and one the other way round."""
    draw, at, made = random.Random(0), 0.0, list[tuple[float, Request]]()
    while (at := at + draw.expovariate(rate)) < seconds:
        long = len(made) % 5 == 4
        prompt, new = (context - 16, 8) if long else (16, context // 4)
        ids = tuple(draw.randrange(vocab) for _ in range(prompt))
        made.append((at, Request(prompt=ids, max_new=new, sampling=GREEDY)))
    return made


def serve(cluster: Cluster, load: list[tuple[float, Request]]) -> Run:
    """Requests at their times, whatever the answers do."""
    run, coming, began = Run(), list(load), time.perf_counter()
    asked, last = dict[int, float](), dict[int, float]()
    while coming or cluster.busy:
        now = time.perf_counter() - began
        while coming and coming[0][0] <= now:
            at, request = coming.pop(0)
            asked[cluster.submit(request)] = at
        said = cluster.step()
        now = time.perf_counter() - began
        for token in said:
            if token.request in last:
                run.gaps.append(now - last[token.request])
            else:
                run.firsts.append(now - asked[token.request])
            last[token.request] = now
        run.tokens += len(said)
    run.seconds = time.perf_counter() - began
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llama-11m")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals, for each arm and round")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_model(given.model)
    load = requests(spec.vocab, spec.context, given.seconds, given.rate)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(given.rounds):  # in turns, so that a busy machine is unfair to all alike
        for name, (config, change) in ARMS.items():
            settings = EngineConfig.model_validate({"max_running": 32, "prefix": False, **change})
            with Cluster(partial(engine, given.model, settings), spec, letters(), settings, config) as cluster:
                serve(cluster, load[:2])  # the first steps of a process are slow
                rows[name].append(serve(cluster, load).row())
    report(given.model, len(load), rows, given.json)


def report(model: str, count: int, rows: dict[str, list[dict[str, float]]], as_json: bool) -> None:
    """Medians over the rounds, and the median of each round's ratio to the first arm."""
    base, told = next(iter(rows.values())), {}
    print(f"{model}, {count} requests an arm and round, {torch.get_num_threads()} thread a process")
    for name, found in rows.items():
        middle = {key: median(row[key] for row in found) for key in found[0]}
        ratio = {key: median(mine[key] / its[key] for mine, its in zip(found, base, strict=True)) for key in found[0]}
        told[name] = {"median": middle, "ratio": ratio}
        print(f"{name:20}", "  ".join(f"{key} {value:8.1f} (x{ratio[key]:.2f})" for key, value in middle.items()))
    if as_json:
        print(json.dumps({"model": model, "requests": count, "arms": told}))


if __name__ == "__main__":
    main()
