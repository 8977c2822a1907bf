"""Qwen3: a norm on each head's queries and keys, no biases. arXiv 2505.09388."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("qwen3",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    norm = shared.rmsnorm(c)
    mixer = shared.attention(c, qk_norm={"norm": norm}, bias=shared.biases(c))
    blocks, pattern = shared.windowed(
        c, lambda sees: {"mixer": {**mixer, "sees": sees}, "ffn": shared.gated(c), "norm": {"kind": norm}}
    )
    return shared.decoder(c, blocks, pattern, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    found = outward.decoder(spec, "qwen3", "Qwen3ForCausalLM") | outward.rope(spec) | outward.windowed(spec)
    return {**found, "attention_bias": outward.biased(spec)}
