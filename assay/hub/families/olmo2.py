"""OLMo 2: norms after the branches only, and over all heads' queries and keys together. arXiv 2501.00656."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("olmo2",)
NAMES = shared.over(
    {
        "blocks.*.mixer_post.*": "model.layers.*.post_attention_layernorm.*",
        "blocks.*.ffn_post.*": "model.layers.*.post_feedforward_layernorm.*",
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    norm = shared.rmsnorm(c)
    mixer = shared.attention(c, qk_norm={"norm": norm, "over": "full"}, bias=shared.biases(c))
    block = {"mixer": mixer, "ffn": shared.gated(c), "norm": {"place": "output", "kind": norm}}
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    found = outward.decoder(spec, "olmo2", "Olmo2ForCausalLM") | outward.rope(spec)
    return {**found, "attention_bias": outward.biased(spec)}
