"""A trial without a model: its loss is that of a known law, plus a parabola in the learning rate."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from assay.laws.law import Law

LAW = Law(1.2, 40.0, 60.0, 0.4, 0.35)
BEST = 4e-3
"""The learning rate at which every size does best."""


def params(tree: dict[str, Any]) -> int:
    """Of the ladder's own models: 2 layers with 4 d^2 + 3 d f, gains, and a tied table."""
    d = tree["d_model"]
    width = tree["blocks"]["b"]["ffn"]["width"]
    return int(tree["vocab"] * d + tree["layers"] * (4 * d * d + 3 * d * width + 2 * d) + d)


def run_trial(job: dict[str, Any], progress: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    n, tokens = params(job["spec"]), int(job["recipe"]["tokens"])
    away = math.log2(job["recipe"]["optimizer"]["lr"] / BEST)
    found = {
        "loss_nats": float(LAW.loss(n, tokens)) + 0.05 * away**2,
        "diverged": False,
        "params_total": n,
        "params_active": n,
        "params_embedding": job["spec"]["vocab"] * job["spec"]["d_model"],
        "tokens": tokens,
        "steps": tokens // 64,
        "train_s": 0.0,
        "train_flops": 6.0 * n * tokens,
        "noise_scale_tokens": 100.0 / float(LAW.loss(n, tokens)) ** 4,
        "foreseen": '"prediction"' in (Path(job["room"]) / "results.jsonl").read_text()
        if (Path(job["room"]) / "results.jsonl").exists()
        else False,
    }
    common = {key: job[key] for key in ("study", "arm", "seed", "spec_digest", "recipe_digest")}
    return [{"kind": "trial", **common, "values": found}]


def failing(job: dict[str, Any], progress: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    raise ValueError("nothing runs")
