"""Granite 3: Llama with four multipliers, after muP. IBM 2024, Granite 3.0 language models."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("granite",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    mixer = shared.attention(c, scores={"scale": c.number("attention_multiplier", 1.0)})
    mixer["bias"] = shared.biases(c)
    block = {
        "mixer": mixer,
        "ffn": shared.gated(c, bias=c.flag("mlp_bias", False)),
        "norm": {"kind": shared.rmsnorm(c)},
        "scale": c.number("residual_multiplier", 1.0),
    }
    tree = shared.decoder(c, {"block": block}, positions={"main": c.rope()})
    tree["head"]["scale"] = 1.0 / c.positive("logits_scaling", 1.0)
    return {**tree, "embed": {"kind": "token", "scale": c.number("embedding_multiplier", 1.0)}}


def hugging_face(spec: ModelSpec) -> Tree:
    scale = outward.part(spec, "mixer", "gqa").scores.scale
    return {
        **outward.decoder(spec, "granite", "GraniteForCausalLM"),
        **outward.rope(spec),
        "attention_bias": outward.biased(spec),
        "mlp_bias": outward.part(spec, "ffn", "gated").bias,
        "attention_multiplier": outward.head_size(spec) ** -0.5 if scale is None else scale,
        "residual_multiplier": next(branch.scale for _, _, branch in spec.branches(0)),
        "logits_scaling": 1.0 / outward.of_kind(spec.head, "head", "lm").scale,
        "embedding_multiplier": outward.of_kind(spec.embed, "embed", "token").scale,
    }
