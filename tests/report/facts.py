"""What the made-up study says: stages, arms, claims and the synthesis. Nothing was measured."""

from __future__ import annotations

from typing import Any

RECIPE = {"positions": "recipe-quick-128", "kv-sharing": "recipe-quick-128", "windows": "recipe-quick-256"}
SEEDS = (0, 1, 2)
YAML = "d_model: 64\nlayers: 4\nblocks:\n  - mixer: {kind: gqa, heads: 4, kv_heads: 4, head_dim: 16}\n"
# stage -> (title, question, base arm, {arm: (title, changes, loss, state bytes per token, growth of loss with length)})
STAGES: dict[str, Any] = {
    "baseline": ("Baseline", "How noisy is the base recipe?", "base", {"base": ("Base model", {}, 1.72, 1024, 0.30)}),
    "positions": (
        "Positions",
        "How should a small decoder know where a token stands, and what happens beyond the training length?",
        "none",
        {
            "none": ("No positions (NoPE)", {"model.position": None}, 2.101, 1024, 0.05),
            "rope": ("Rotary (RoPE)", {"model.position": "rope"}, 1.720, 1024, 0.31),
            "alibi": ("Linear bias (ALiBi)", {"model.position": "alibi"}, 1.803, 1024, 0.01),
            "learned": ("Learned table", {"model.position": "learned"}, 2.083, 1024, 0.0),
            "sinusoidal": ("Sinusoidal", {"model.position": "sin"}, 1.978, 1024, 0.36),
        },
    ),
    "kv-sharing": (
        "Sharing keys and values",
        "How much quality does a smaller cache cost?",
        "mha",
        {
            "mha": ("All heads (MHA)", {"model.blocks.*.mixer.kv_heads": 4}, 1.718, 1024, 0.3),
            "gqa-2": (
                "Two groups (GQA-2)",
                {"model.blocks.*.mixer.kv_heads": 2, "model.ffn.width": 197},
                1.714,
                512,
                0.3,
            ),
            "mqa": ("One head (MQA)", {"model.blocks.*.mixer.kv_heads": 1, "model.ffn.width": 208}, 1.731, 256, 0.3),
        },
    ),
    "windows": (
        "Windows",
        "What does a short attention window cost at this budget?",
        "full",
        {
            "full": ("Full attention", {}, 1.486, 1024, 0.3),
            "w64": ("Window 64", {"model.blocks.*.mixer.sees.window": 64}, 1.446, 1024, 0.05),
            "w16": ("Window 16", {"model.blocks.*.mixer.sees.window": 16}, 1.427, 512, 0.02),
            "hybrid": ("Five local to one full", {"model.pattern": "LLLLLF"}, 1.46, 640, 0.1),
        },
    ),
    "synthesis": (
        "Synthesis",
        "Does the configuration that the evidence picks beat the baseline?",
        "baseline",
        {
            "baseline": ("Baseline", {}, 1.722, 1024, 0.3),
            "chosen": ("Chosen", {"model.position": "rope", "model.blocks.*.mixer.kv_heads": 1}, 1.612, 256, 0.08),
        },
    ),
}
VERDICTS = {
    "rope": "better",
    "alibi": "better",
    "learned": "not distinguishable",
    "sinusoidal": "better",
    "gqa-2": "not distinguishable",
    "mqa": "not distinguishable",
    "w64": "better",
    "w16": "better",
    "chosen": "better",
}
CLAIMS = {
    "positions": [
        (
            "RoPE trains to a lower loss than no positions",
            "Su et al. 2021, arXiv 2104.09864",
            "confirmed",
            "−0.381 nats, interval −0.42 to −0.34, 3 paired seeds",
        ),
        (
            "ALiBi keeps its loss at eight times the training length",
            "Press et al. 2022, arXiv 2108.12409",
            "confirmed",
            "loss at 8× is 1.824 against 1.803 at 1×, ratio 1.01 ≤ 1.1",
        ),
        ("RoPE does not extrapolate without scaling", "Press et al. 2022", "confirmed", "+0.93 nats at 8×"),
        (
            "Learned positions match RoPE at short length",
            "Vaswani et al. 2017",
            "contradicted",
            "learned is 0.363 nats behind RoPE",
        ),
    ],
    "kv-sharing": [
        (
            "GQA is close to MHA in quality",
            "Ainslie et al. 2023, arXiv 2305.13245",
            "confirmed",
            "equivalent within 0.05 nats",
        ),
        (
            "MQA loses quality against MHA",
            "Shazeer 2019, arXiv 1911.02150",
            "not distinguishable",
            "+0.013 nats, interval −0.06 to +0.08; 100 seeds would resolve it",
        ),
    ],
    "windows": [
        (
            "Short windows cost loss",
            "Beltagy et al. 2020, arXiv 2004.05150",
            "contradicted",
            "at this budget windows are 0.04 to 0.06 nats better: locality speeds up learning",
        ),
        ("A few full layers restore recall", "Gemma 3 report 2025, arXiv 2503.19786", "not tested", ""),
    ],
}
TABLE: list[dict[str, Any]] = [
    {
        "metric": "loss_nats",
        "unit": "nats",
        "baseline": 1.722,
        "chosen": 1.612,
        "delta": -0.11,
        "low": -0.145,
        "high": -0.075,
        "verdict": "better",
    },
    {
        "metric": "state_bytes_per_token",
        "unit": "",
        "baseline": 1024,
        "chosen": 256,
        "delta": -768,
        "low": None,
        "high": None,
        "verdict": "better",
    },
    {
        "metric": "passkey.accuracy",
        "unit": "share",
        "baseline": 1.0,
        "chosen": 0.34,
        "delta": -0.66,
        "low": -0.72,
        "high": -0.59,
        "verdict": "worse",
    },
    {
        "metric": "decode_tok_s",
        "unit": "",
        "baseline": 2310.0,
        "chosen": 2984.0,
        "delta": 674.0,
        "low": 580.0,
        "high": 768.0,
        "verdict": "better",
    },
    {
        "metric": "params_total",
        "unit": "count",
        "baseline": 215000,
        "chosen": 214100,
        "delta": -900,
        "low": None,
        "high": None,
        "verdict": "not distinguishable",
    },
]
CHOICES: list[dict[str, Any]] = [
    {
        "study": "positions",
        "arm": "rope",
        "reason": "0.381 nats better than none, the largest supported gain",
        "supported": True,
    },
    {
        "study": "kv-sharing",
        "arm": "mqa",
        "reason": "not distinguishable from MHA; a quarter of the state",
        "supported": False,
    },
    {
        "study": "windows",
        "arm": "w16",
        "reason": "0.059 nats better than full attention at this budget",
        "supported": True,
    },
]
SYNTHESIS: dict[str, Any] = {
    "constraints": {"state_bytes_per_token": 512, "params_total": 220000},
    "choices": CHOICES,
    "spec": YAML,
    "table": TABLE,
    "checkpoint": "runs/tour/chosen",
}
