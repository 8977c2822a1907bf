"""Mistral 7B and its successors. Jiang et al. 2023, arXiv 2310.06825."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("mistral",)
NAMES, SKIP, SAME = shared.LLAMA, shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    sees = shared.window_if_any(c)
    block = {"mixer": shared.attention(c, sees=sees), "ffn": shared.gated(c), "norm": {"kind": shared.rmsnorm(c)}}
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    found = outward.decoder(spec, "mistral", "MistralForCausalLM") | outward.rope(spec)
    return {**found, "sliding_window": outward.window(spec)}
