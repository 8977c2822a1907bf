"""Phi-3, Phi-3.5 and Phi-4-mini: fused projections, LongRoPE, part of each head turned. arXiv 2404.14219."""

from __future__ import annotations

from assay.hub import shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Fused

TYPES = ("phi3",)
NAMES = shared.over(
    {
        "blocks.*.mixer.{q,k,v}.*": Fused("model.layers.*.self_attn.qkv_proj.*"),
        "blocks.*.ffn.{gate,up}.*": Fused("model.layers.*.mlp.gate_up_proj.*"),
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    sees = shared.window(c) if c.has("sliding_window") else {}
    c.ignore("original_max_position_embeddings")
    block = {"mixer": shared.attention(c, sees=sees), "ffn": shared.gated(c), "norm": {"kind": shared.rmsnorm(c)}}
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})
