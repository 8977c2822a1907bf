"""LFM2: short convolutions between gates, with attention in some layers. Liquid AI 2025, arXiv 2511.23404."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Fused
from assay.spec.model import ModelSpec

TYPES = ("lfm2",)
SKIP, SAME = shared.SKIP, shared.SAME
MIXER, CONV, ATTENTION = "blocks.*.mixer", "model.layers.*.conv", "model.layers.*.self_attn"


def names(model: ModelSpec) -> Names:
    convs = shared.layers_with(model, "gated_conv")
    own: Names = {
        "blocks.*.mixer_norm.*": "model.layers.*.operator_norm.*",
        **{f"blocks.{i}.mixer.out.*": f"model.layers.{i}.conv.out_proj.*" for i in convs},
        f"{MIXER}.{{b,c,value}}.*": Fused(f"{CONV}.in_proj.*"),
        f"{MIXER}.weight": Depthwise(f"{CONV}.conv.weight"),
        f"{MIXER}.shift": f"{CONV}.conv.bias",
        "blocks.*.ffn_norm.*": "model.layers.*.ffn_norm.*",
        "blocks.*.ffn.gate.*": "model.layers.*.feed_forward.w1.*",
        "blocks.*.ffn.up.*": "model.layers.*.feed_forward.w3.*",
        "blocks.*.ffn.down.*": "model.layers.*.feed_forward.w2.*",
        "final_norm.*": "model.embedding_norm.*",
    }
    attention: Names = {
        f"{MIXER}.out.*": f"{ATTENTION}.out_proj.*",
        f"{MIXER}.q_norm.*": f"{ATTENTION}.q_layernorm.*",
        f"{MIXER}.k_norm.*": f"{ATTENTION}.k_layernorm.*",
    }
    return shared.over({**own, **attention})


def spec(c: Config) -> Tree:
    norm = {"kind": "rmsnorm", "eps": c.number("norm_eps", 1e-5)}
    attend = c.listed("full_attn_idxs", None)
    kinds = c.each_layer(
        "layer_types",
        c.integer("num_hidden_layers"),
        lambda i: shared.FULL if attend is None or i in attend else "conv",
    )
    conv = {"kind": "gated_conv", "size": c.integer("conv_L_cache", 3, least=2), "bias": c.flag("conv_bias", False)}
    rest = {"ffn": {"kind": "gated", "width": width(c)}, "norm": {"kind": norm}}
    made = {
        shared.FULL: lambda: {"mixer": shared.attention(c, qk_norm={"norm": norm}), **rest},
        "conv": lambda: {"mixer": conv, **rest},
    }
    blocks, pattern = shared.by_kind(c, kinds, made)
    tree = shared.decoder(c, blocks, pattern, True, final_norm=norm, positions={"main": c.rope(theta=1_000_000.0)})
    tree["head"]["tie"] = c.flag("tie_embedding", tree["head"]["tie"])
    return tree


def width(c: Config) -> int:
    """Of the feed-forward network: two thirds of what is said, times a factor, rounded up where there is a factor."""
    found: int = c.integer("block_ff_dim", c.integer("intermediate_size", 12_288))
    times, multiple = c.number("block_ffn_dim_multiplier", 1.0), c.integer("block_multiple_of", 256)
    if not c.flag("block_auto_adjust_ff_dim", True):
        return found
    found = int(2 * found / 3)
    if "block_ffn_dim_multiplier" in c.values and not c.has("block_ffn_dim_multiplier"):
        return found
    return -(-int(times * found) // multiple) * multiple


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    conv, net = outward.part(spec, "mixer", "gated_conv"), outward.part(spec, "ffn", "gated")
    convs = outward.kinds_at(spec, "mixer", "gated_conv")
    return {
        **outward.sizes(spec, "lfm2", "Lfm2ForCausalLM"),
        **outward.grouped(spec),
        **outward.rope(spec),
        "norm_eps": outward.epsilon(spec),
        "layer_types": ["conv" if i in convs else shared.FULL for i in range(spec.layers)],
        "conv_L_cache": conv.size,
        "conv_bias": conv.bias,
        "intermediate_size": net.width,
        "block_auto_adjust_ff_dim": False,
    }
