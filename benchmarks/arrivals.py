"""What the engine takes of the processor where requests come and go, by how many bytes of tapes it keeps.

python benchmarks/arrivals.py [MODEL ...] [--held 0,256] [--requests 150] [--apart 6] [--rounds 3]

One thread, random weights. A request of 4 to 80 tokens with a reply of 5 to 100 comes every so many steps on average
(exponential gaps), 16 run at once: the same requests for all, the variants in turns. Seconds of processor time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict

import torch
from apart import GREEDY, engine

from assay.engine import tapes
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.request import Request
from assay.spec.load import load_model


def drawn(count: int, apart: float, vocab: int, seed: int) -> list[tuple[float, Request]]:
    """Requests, and the step at which each comes."""
    draw, at, made = random.Random(seed), 0.0, list[tuple[float, Request]]()
    for _ in range(count):
        at += draw.expovariate(1 / apart)
        prompt = tuple(draw.randrange(vocab) for _ in range(draw.randint(4, 80)))
        made.append((at, Request(prompt=prompt, max_new=draw.randint(5, 100), sampling=GREEDY)))
    return made


def serve(served: Engine, load: list[tuple[float, Request]]) -> int:
    """How many steps it took."""
    coming, at, steps = list(load), 0, 0
    while coming or served.busy:
        while coming and coming[0][0] <= at:
            served.submit(coming.pop(0)[1])
        if served.busy:
            served.step()
            steps += 1
        at += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["lab-64", "lab-64-hybrid"])
    parser.add_argument("--held", default="0,256", help="MiB of tapes that are kept; 0: the four that always are")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--apart", type=float, default=6.0, help="steps from one request to the next")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        took = defaultdict[int, list[float]](list)
        for number in range(given.rounds):
            load = drawn(given.requests, given.apart, load_model(name).vocab, number)
            for held in [int(text) for text in given.held.split(",")]:
                tapes.HELD = held << 20
                made = engine(name, EngineConfig(max_running=16, tokens=256))
                began = time.process_time()
                steps = serve(made, load)
                took[held].append(time.process_time() - began)
        for held, seconds in took.items():
            print(f"{name}, {held} MiB of tapes: {', '.join(f'{s:.2f}' for s in seconds)} s; {steps} steps", flush=True)


if __name__ == "__main__":
    main()
