"""Trial functions without a model: a loss is a formula of the spec and noise of the seed. Light to import."""

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

Tree = dict[str, Any]
EFFECT: Mapping[str, float] = {"rope": -0.4, "alibi": -0.2, "none": 0.0, "bad": 1.0}
# The learning rate at which each does best.
BEST: Mapping[str, float] = {"rope": 0.004, "alibi": 0.016, "none": 0.004, "bad": 0.004}


def digest(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def params(tree: Tree) -> int:
    """Three matrices a layer and four kv projections' worth."""
    return sum(3 * tree["width"] * layer["ffn"]["width"] + 64 * tree["kv"] for layer in tree["layers"])


def sizes(tree: Tree) -> dict[str, float]:
    return {"params": params(tree), "active_flops": 2 * params(tree), "state_bytes": 16 * tree["kv"]}


def loss(spec: Tree, seed: int, recipe: Tree | None = None) -> float:
    """With a recipe: at its learning rate, a tenth of a nat worse for each factor of two squared from the best."""
    shared = random.Random(seed).gauss(0, 0.01)
    own = random.Random(f"{seed} {digest(spec)}").gauss(0, 0.01)
    away = math.log2(recipe["optimizer"]["lr"] / BEST[spec["position"]]) if recipe else 0.0
    return 2.0 + EFFECT[spec["position"]] + shared + own + 0.1 * away**2


def run_trial(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """A trial line, a measurement, and a note of which process ran it."""
    value = loss(job["spec"], job["seed"], job["recipe"])
    progress({"fraction": 0.5, "loss_nats": value + 1})
    common = {key: job[key] for key in ("study", "arm", "seed", "spec_digest", "recipe_digest")}
    size = sizes(job["spec"])
    values = {
        "loss_nats": value,
        "diverged": False,
        "params_total": size["params"],
        "state_bytes_per_token": size["state_bytes"],
        "pid": os.getpid(),
        "parts": job["parts"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
    }
    if job["keep"]:
        os.makedirs(job["keep"])
    out: list[Tree] = [{"kind": "trial", **common, "values": values}]
    for asked in job["measurements"]:
        rows = [{"ratio": r, "loss_nats": value + 0.1 * r} for r in asked["options"].get("ratios", [1, 8])]
        out.append({"kind": "measure", **common, "values": {"what": asked["name"], "rows": rows}})
    return out


def crashing(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """One arm kills its process, another raises; the rest run."""
    if job["arm"] == "alibi":
        os.kill(os.getpid(), 9)
    if job["arm"] == "rope":
        raise ValueError("rope is broken")
    return run_trial(job, progress)


def hanging(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    if job["arm"] == "alibi":
        time.sleep(3600)
    return run_trial(job, progress)


def no_high_rates(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    if job["recipe"]["optimizer"]["lr"] > 0.01:
        raise ValueError("too hot")
    return run_trial(job, progress)


def wordy(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """Says what is no Result."""
    return [{"kind": "nonsense", "values": {}}]


def slow(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """Long enough that several run at once."""
    time.sleep(1.0)
    return run_trial(job, progress)


def killed_once(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """One arm kills its process the first time; another raises."""
    mark = os.path.join(os.environ["TMPDIR"], "killed")
    if job["arm"] == "alibi" and not os.path.exists(mark):
        with open(mark, "w") as file:
            file.write("alibi")
        os.kill(os.getpid(), 9)
    if job["arm"] == "rope":
        raise ValueError("rope is broken")
    return run_trial(job, progress)
