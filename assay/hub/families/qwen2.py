"""Qwen2 and Qwen2.5: biases on queries, keys and values; windows in the upper layers where asked. arXiv 2407.10671."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("qwen2",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    mixer, norm = shared.attention(c, bias="qkv"), {"kind": shared.rmsnorm(c)}
    blocks, pattern = shared.windowed(
        c, lambda sees: {"mixer": {**mixer, "sees": sees}, "ffn": shared.gated(c), "norm": norm}
    )
    return shared.decoder(c, blocks, pattern, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    return outward.decoder(spec, "qwen2", "Qwen2ForCausalLM") | outward.rope(spec) | outward.windowed(spec)
