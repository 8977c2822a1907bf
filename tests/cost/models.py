"""Published shapes as specs, and small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.spec.load import validate
from assay.spec.model import ModelSpec


def decoder(
    d: int, layers: int, heads: tuple[int, int], width: int, vocab: int, context: int = 4096, **more: Any
) -> ModelSpec:
    """RoPE, RMSNorm, SwiGLU, untied; `heads` is (query heads, key heads); `mixer` and `ffn` add fields."""
    mixer = {"kind": "gqa", "heads": heads[0], "kv_heads": heads[1], "position": "p", **more.pop("mixer", {})}
    ffn = {"kind": "gated", "width": width, **more.pop("ffn", {})}
    tree = {"d_model": d, "vocab": vocab, "layers": layers, "context": context, "positions": {"p": "rope"}}
    return validate(ModelSpec, {**tree, "blocks": {"b": {"mixer": mixer, "ffn": ffn}}, **more}, "here")


def llama3_8b(context: int = 8192) -> ModelSpec:
    return decoder(4096, 32, (32, 8), 14336, 128_256, context)


def llama31_405b(layers: int = 126) -> ModelSpec:
    return decoder(16384, layers, (128, 8), 53248, 128_256, 131_072)


def mixtral_8x7b() -> ModelSpec:
    return decoder(4096, 32, (32, 8), 14336, 32_000, ffn={"kind": "moe", "experts": 8})


def gpt2() -> ModelSpec:
    norm = {"kind": "layernorm"}
    block = {
        "mixer": {"kind": "gqa", "heads": 12, "position": "p", "bias": "all"},
        "ffn": {"kind": "dense", "width": 3072, "act": "gelu_tanh", "bias": True},
        "norm": {"kind": norm},
    }
    tree = {"d_model": 768, "vocab": 50257, "layers": 12, "context": 1024, "positions": {"p": "learned"}}
    return validate(
        ModelSpec, {**tree, "blocks": {"b": block}, "final_norm": norm, "head": {"kind": "lm", "tie": True}}, "gpt2"
    )


def gemma3_27b(pattern: Sequence[str]) -> ModelSpec:
    """arXiv 2503.19786: 62 layers, 16 key-value heads of 128, windows of 1024 in five of six layers."""
    mixer = {"kind": "gqa", "heads": 32, "kv_heads": 16, "head_dim": 128}
    ffn = {"kind": "gated", "width": 21504, "act": "gelu_tanh"}
    blocks = {
        "local": {"mixer": {**mixer, "sees": {"window": 1024}}, "ffn": ffn},
        "global": {"mixer": mixer, "ffn": ffn},
    }
    tree = {"d_model": 5376, "vocab": 262_208, "layers": 62, "context": 131_072, "pattern": list(pattern)}
    return validate(ModelSpec, {**tree, "blocks": {n: blocks[n] for n in dict.fromkeys(pattern)}}, "gemma3")


MIXERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "gqa", "heads": 4},
    "grouped": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6, "gate": "element", "bias": "all"},
    "window": {"kind": "gqa", "heads": 4, "sees": {"window": 5}, "scores": {"sink": True}},
    "kept": {"kind": "gqa", "heads": 4, "sees": {"window": 5, "first": 2}},
    "chunk": {"kind": "gqa", "heads": 4, "sees": {"chunk": 6}, "gate": "head"},
    "linear": {"kind": "linear", "heads": 2},
    "norms": {"kind": "gqa", "heads": 4, "qk_norm": {"over": "full"}},
}


def small(layers: Sequence[str], **changes: Any) -> ModelSpec:
    """One layer for each named mixer."""
    blocks = {name: {"mixer": MIXERS[name], "ffn": {"kind": "gated", "width": 24}} for name in layers}
    tree = {"d_model": 16, "vocab": 19, "layers": len(layers), "context": 512, "pattern": list(layers)}
    return validate(ModelSpec, {**tree, "blocks": blocks, **changes}, "small")
