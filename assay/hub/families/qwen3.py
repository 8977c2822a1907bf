"""Qwen3: a norm on each head's queries and keys, no biases. arXiv 2505.09388."""

from __future__ import annotations

from assay.hub import shared
from assay.hub.config import Config, Tree

TYPES = ("qwen3",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    norm = shared.rmsnorm(c)
    mixer = shared.attention(c, qk_norm={"norm": norm}, bias="all" if c.flag("attention_bias", False) else "none")
    blocks, pattern = shared.windowed(
        c, lambda sees: {"mixer": {**mixer, "sees": sees}, "ffn": shared.gated(c), "norm": {"kind": norm}}
    )
    return shared.decoder(c, blocks, pattern, positions={"main": c.rope()})
