"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, LongRoPE, part of each head turned. arXiv 2404.14219."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Fused
from assay.spec.model import ModelSpec

TYPES = ("phi3",)
NAMES = shared.over(
    {
        "blocks.*.mixer.{q,k,v}.*": Fused("model.layers.*.self_attn.qkv_proj.*"),
        "blocks.*.ffn.{gate,up}.*": Fused("model.layers.*.mlp.gate_up_proj.*"),
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    sees = shared.window_if_any(c)
    c.ignore("original_max_position_embeddings")
    block = {"mixer": shared.attention(c, sees=sees), "ffn": shared.gated(c), "norm": {"kind": shared.rmsnorm(c)}}
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    scaling = outward.position(spec, "rope").scaling
    if scaling is not None and scaling.kind != "longrope":
        raise ValueError(f"positions: rope: scaling: {scaling.kind!r}; longrope, or none, is expected")
    found = outward.decoder(spec, "phi3", "Phi3ForCausalLM") | outward.rope(spec, partial=True)
    original = spec.context if scaling is None else scaling.original
    return {**found, "sliding_window": outward.window(spec), "original_max_position_embeddings": original}
