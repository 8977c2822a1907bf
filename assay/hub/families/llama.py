"""Llama 1 to 3, and what is built alike. Touvron et al. 2023, arXiv 2302.13971; Llama team 2024, arXiv 2407.21783."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("llama",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    block = {
        "mixer": shared.attention(c, bias=shared.biases(c)),
        "ffn": shared.gated(c, bias=c.flag("mlp_bias", False)),
        "norm": {"kind": shared.rmsnorm(c)},
    }
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec)
    biases = {"attention_bias": outward.biased(spec), "mlp_bias": outward.part(spec, "ffn", "gated").bias}
    return outward.decoder(spec, "llama", "LlamaForCausalLM") | outward.rope(spec) | biases
