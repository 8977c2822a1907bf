"""A made-up study that looks like a real one: five stages, every kind of Result, noisy seeds. Nothing was measured."""

from __future__ import annotations

import math
import random
from typing import Any

from assay.spec.result import Result
from tests.report.facts import CLAIMS, RECIPE, SEEDS, STAGES, SYNTHESIS, VERDICTS, YAML


def tour() -> list[Result]:
    """About 250 Results of a study with five stages."""
    rng = random.Random(0)
    machine = {
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "python": "3.11.7",
        "torch": "2.13.0",
        "precision": "bf16",
        "bf16_matmul_gflop_s": 212.4,
        "f32_matmul_gflop_s": 96.1,
        "memory_gb_s": 21.7,
    }
    out = [line("environment", "tour", values=machine)]
    out.append(
        line(
            "study",
            "tour",
            values={
                "title": "A tour of a small decoder",
                "question": "What do the usual choices cost and buy at a budget of twelve minutes on two cores?",
                "arms": [],
                "command": "assay study run tour --out runs/tour --budget quick",
            },
        )
    )
    for name in STAGES:
        out += stage(name, rng)
    return out


def line(kind: str, study: str, arm: str | None = None, seed: int | None = None, **given: Any) -> Result:
    recipe = None if kind in ("environment",) or study == "tour" else RECIPE.get(study, "recipe-quick-128")
    digest = f"spec-{study}-{arm}" if arm else None
    fields = {"spec_digest": digest, "recipe_digest": recipe, "commit": "0f3a9c2", "version": "0.1.0", "threads": 1}
    return Result(kind=kind, study=study, arm=arm, seed=seed, **{**fields, **given})  # type: ignore[arg-type]


def stage(name: str, rng: random.Random) -> list[Result]:
    title, question, base, arms = STAGES[name]
    listed = [
        {"name": a, "title": t, "changes": c, "spec_digest": f"spec-{name}-{a}"} for a, (t, c, *_) in arms.items()
    ]
    info = {
        "title": title,
        "question": question,
        "budget": "quick",
        "base": YAML,
        "base_arm": base,
        "arms": listed,
        "note": f"Best learning rates of {title} agree.",
        "recipe": "tokens: 400000\nlearning_rate: 0.004\nbatch: 4\n",
        "metric": "loss_nats",
        "command": "assay study run tour --out runs/tour --budget quick",
    }
    out = [line("study", name, values=info)]
    for arm, (_, _, loss, state, growth) in arms.items():
        for seed in SEEDS:
            out += run(name, arm, seed, loss + rng.gauss(0, 0.012), (state, growth), rng)
        if arm != base and arm in VERDICTS:
            out += verdicts(name, arm, base, loss - arms[base][2], rng)
        if name == "positions":
            rates = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
            losses = [loss + 0.06 * math.log2(r / 4e-3) ** 2 for r in rates]
            out.append(line("sweep", name, arm, values={"learning_rate": rates, "loss_nats": losses, "optimum": 4e-3}))
    for i, (text, source, outcome, evidence) in enumerate(CLAIMS.get(name, [])):
        test = "verdict(loss_nats, arm=rope, base=none) == better"
        values = {
            "id": f"{name}-{i}",
            "text": text,
            "source": source,
            "test": test,
            "outcome": outcome,
            "evidence": evidence,
        }
        out.append(line("claim", name, values=values))
    return [*out, line("synthesis", name, values=SYNTHESIS)] if name == "synthesis" else out


def verdicts(name: str, arm: str, base: str, delta: float, rng: random.Random) -> list[Result]:
    common = {"base_arm": base, "p": 0.004, "p_holm": 0.012 if abs(delta) > 0.03 else 0.64, "seeds": 3, "base_seeds": 3}
    first = {"metric": "loss_nats", "delta": delta, "low": delta - 0.035, "high": delta + 0.035, "noise": 0.021}
    far = {"metric": "extrapolation.loss_nats", "delta": 0.4 * rng.random(), "low": -0.05, "high": 0.5, "noise": 0.03}
    out = [line("verdict", name, arm, values={**common, **first, "verdict": VERDICTS[arm]})]
    if name == "positions":
        out.append(line("verdict", name, arm, values={**common, **far, "verdict": "not distinguishable"}))
    return out


def run(name: str, arm: str, seed: int, loss: float, shape: tuple[int, float], rng: random.Random) -> list[Result]:
    state, growth = shape
    tokens = [4000 * (i + 1) for i in range(100)]
    fall = [loss + 3.6 * math.exp(-t / 60000) + 0.0000004 * (400000 - t) for t in tokens]
    values = {
        "loss_nats": loss,
        "bits_per_byte": loss / math.log(2),
        "tokens": 400000,
        "steps": 781,
        "train_s": 9.4,
        "train_tok_s": 42000.0 + rng.gauss(0, 900),
        "mfu": 0.31,
        "params_total": 215_000,
        "params_active": 215_000,
        "params_embedding": 16384,
        "state_bytes_per_token": state,
        "train_flops": 5.2e11,
        "peak_memory_bytes": 412 << 20,
        "in_context_nats": 0.41,
        "diverged": False,
        "curve": {"tokens": tokens, "loss_nats": [v + rng.gauss(0, 0.05) for v in fall]},
        "valid_curve": {"tokens": tokens[4::8], "loss_nats": fall[4::8]},
        "by_position": {"position": list(range(1, 129)), "loss_nats": [loss + 1.4 / p**0.7 for p in range(1, 129)]},
    }
    out = [line("trial", name, arm, seed, values=values)]
    ratios = [1, 2, 4, 8] if arm != "learned" else [1]
    rows = [
        {
            "variant": "base",
            "length": 128 * r,
            "ratio": r,
            "loss_nats": loss + growth * math.log2(r),
            "last_nats": loss + 1.6 * growth * math.log2(r),
        }
        for r in ratios
    ]
    if arm == "rope":
        rows += [{**r, "variant": "yarn", "loss_nats": loss + 0.4 * (r["loss_nats"] - loss)} for r in rows]
    out.append(measure(name, arm, seed, "extrapolation", rows))
    if seed == 0:
        out += measures(name, arm, loss, shape, rng)
    return out


def measure(name: str, arm: str, seed: int, what: str, rows: list[dict[str, Any]]) -> Result:
    return line("measure", name, arm, seed, values={"what": what, "rows": rows})


Tables = dict[str, list[dict[str, Any]]]


def measures(name: str, arm: str, loss: float, shape: tuple[int, float], rng: random.Random) -> list[Result]:
    tables = speed(*shape)
    if name == "baseline":
        tables |= inside(loss)
    if name in ("positions", "windows"):
        tables |= recall(rng)
    out = [measure(name, arm, 0, what, rows) for what, rows in tables.items()]
    if arm in ("none", "alibi", "w16"):
        text = "the key is 48213. The grass is green. The sky is blue. The key is the key is the key is the"
        values = {
            "metric": "accuracy",
            "score": 0.0,
            "prompt": "Remember 91734. … What is the key?",
            "text": text,
            "why": "the answer repeats the question instead of the digits",
        }
        out += [line("failure", name, arm, 0, values={**values, "score": s}) for s in (0.0, 0.05)]
    return out


def speed(state: int, growth: float) -> Tables:
    tables: Tables = {"latency": [], "memory": []}
    for batch in (1, 8):
        for context in (128, 512, 2048, 8192):
            roof = batch * 2.0e10 / (860_000 + batch * context * state * (1 + growth))
            wait = 1200 / roof
            tables["latency"].append(
                {
                    "batch": batch,
                    "context": context,
                    "cache": "pages",
                    "prefill_s": context * 2e-5,
                    "ttft_s": context * 2.1e-5,
                    "decode_tok_s": 0.7 * roof,
                    "itl_ms_p50": wait,
                    "itl_ms_p99": 1.4 * wait,
                    "roofline_tok_s": roof,
                }
            )
            bytes_ = batch * context * state
            tables["memory"].append(
                {
                    "batch": batch,
                    "context": context,
                    "state_bytes_predicted": bytes_,
                    "state_bytes_measured": bytes_,
                    "peak_memory_bytes": 2 * bytes_ + (300 << 20),
                }
            )
    return tables


def inside(loss: float) -> Tables:
    tables: Tables = {}
    lengths = (256, 512, 1024, 2048, 4096)
    tables["kernels"] = [
        {
            "backend": b,
            "length": n,
            **{f"{way}seconds": k * n * n * 1e-9 for way in ("", "train_")},
            **{f"{way}peak_bytes": m * n * (n if b == "naive" else 64) for way in ("", "train_")},
            **{f"{way}traffic_bytes": 12 * n * n for way in ("", "train_")},
        }
        for b, k, m in (("naive", 9, 16), ("tiled", 4, 64))
        for n in lengths
    ]
    tables["kernels"] += [{"backend": b, "peak_bytes_slope": s} for b, s in (("naive", 2.0), ("tiled", 1.0))]
    tables["training.attention"] = [
        {"part": p / 4, "at_tokens": 100_000 * p, "layer": i, "sink_mass": 0.1 * p + 0.02 * i, "max_logit": 5.0 + p + i}
        for p in range(1, 5)
        for i in range(4)
    ]
    tables["recovery"] = [
        {"variant": v, "tuned": t, "ratio": r, "length": 128 * r, "loss_nats": loss + g * r / (2 if t else 1)}
        for v, g in (("none", 0.4), ("yarn", 0.1))
        for t in (False, True)
        for r in (1, 2, 4)
    ]
    cells = [(b, n, 1e-3 + 1e-6 * b + 4e-9 * b * n) for b in (1, 8) for n in (128, 512)]
    tables["decode_fit"] = [{"batch": b, "context": n, "seconds": t, "fitted_s": t * 1.02} for b, n, t in cells]
    tables["decode_fit"].append({"cell": "fit", "r2": 0.98, "seconds_fixed": 1e-3, "state_byte_s": 2.5e10})
    tables["norms"] = [
        {"kind": k, "tokens": 4096, "width": 64, "forward_s": f, "backward_s": 3 * f, "ratio": f / 2e-4}
        for k, f in (("layernorm", 2e-4), ("rmsnorm", 1.5e-4))
    ]
    tables["lens"] = [{"layer": i, "loss_nats": loss + 0.42 * (4 - i)} for i in range(5)]
    tables["wavelengths"] = [
        {"dim": i, "wavelength": 2 * math.pi * 10 ** (i / 2), "completes": i < 3} for i in range(8)
    ]
    tables["expert_use"] = [{"layer": i, "busiest": 0.31, "idle": 0.02} for i in range(4)]
    return tables


def recall(rng: random.Random) -> Tables:
    tables: Tables = {}
    grid = [(n, n * d // 4) for n in (64, 128, 256, 512) for d in (1, 2, 3)]
    tables["passkey"] = [
        {
            "length": n,
            "distance": d,
            "accuracy": max(0.1, min(1.0, 1.15 - n / 700 + rng.gauss(0, 0.03))),
            "chance": 0.1,
            "samples": 64,
        }
        for n, d in grid
    ]
    tables["attention"] = [
        {"layer": i, "tokens": 4096, "sink_mass": 0.1 + 0.12 * i, "entropy_nats": 3.1 - 0.3 * i, "max_logit": 6 + i}
        for i in range(4)
    ]
    tables["steps_to_loss"] = [
        {"loss_nats": t, "steps": int(9e3 / t**3), "tokens": int(4.6e6 / t**3)} for t in (3.0, 2.5, 2.25, 2.1)
    ]
    return tables
