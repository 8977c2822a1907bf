"""Materials and trial functions without a model: a loss is a formula of the spec and noise of the seed."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from assay.spec.load import apply_changes
from assay.study.plan import Materials

Tree = dict[str, Any]
BASE: Tree = {"width": 8, "position": "none", "kv": 4, "layers": [{"ffn": {"width": 32}}, {"ffn": {"width": 32}}]}
RECIPE: Tree = {"tokens": 65536, "rate": 0.004}
EFFECT: Mapping[str, float] = {"rope": -0.4, "alibi": -0.2, "none": 0.0}


def _digest(tree: Tree) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _tree(root: str, fallback: Tree) -> Callable[[Any, Mapping[str, Any]], tuple[Tree, str]]:
    def load(source: Any, changes: Mapping[str, Any]) -> tuple[Tree, str]:
        base = source if isinstance(source, dict) else fallback
        tree = apply_changes(base, {path.removeprefix(root): value for path, value in changes.items()})
        return tree, _digest(tree)

    return load


def params(tree: Tree) -> int:
    """Three matrices a layer and four kv projections' worth."""
    return sum(3 * tree["width"] * layer["ffn"]["width"] + 64 * tree["kv"] for layer in tree["layers"])


def sizes(tree: Tree) -> dict[str, float]:
    return {"params": params(tree), "active_flops": 2 * params(tree), "state_bytes": 16 * tree["kv"]}


MATERIALS = Materials(_tree("model.", BASE), _tree("recipe.", RECIPE), sizes, lambda model, recipe: 32768.0)


def loss(spec: Tree, seed: int) -> float:
    shared = np.random.default_rng(seed).normal(0, 0.01)
    own = np.random.default_rng([seed, int(_digest(spec)[:8], 16)]).normal(0, 0.01)
    return float(2.0 + EFFECT[spec["position"]] + shared + own)


def run_trial(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """A trial line, a measurement, and a note of which process ran it."""
    value = loss(job["spec"], job["seed"])
    progress({"fraction": 0.5, "loss_nats": value + 1})
    common = {key: job[key] for key in ("study", "arm", "seed", "spec_digest", "recipe_digest")}
    size = sizes(job["spec"])
    values = {
        "loss_nats": value,
        "diverged": False,
        "params_total": size["params"],
        "state_bytes_per_token": size["state_bytes"],
        "pid": os.getpid(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
    }
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


def slow(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    time.sleep(0.5)
    return run_trial(job, progress)


def wordy(job: Tree, progress: Callable[[Tree], None]) -> list[Tree]:
    """Says what is no Result."""
    return [{"kind": "nonsense", "values": {}}]
