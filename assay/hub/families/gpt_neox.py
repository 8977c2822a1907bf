"""GPT-NeoX and Pythia: both branches from their own LayerNorm, part of each head turned. arXiv 2204.06745."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.rules import FusedHeads
from assay.spec.model import ModelSpec

TYPES = ("gpt_neox",)
NAMES = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "blocks.*.mixer_norm.*": "gpt_neox.layers.*.input_layernorm.*",
    "blocks.*.mixer.{q,k,v}.*": FusedHeads("gpt_neox.layers.*.attention.query_key_value.*"),
    "blocks.*.mixer.out.*": "gpt_neox.layers.*.attention.dense.*",
    "blocks.*.ffn_norm.*": "gpt_neox.layers.*.post_attention_layernorm.*",
    "blocks.*.ffn.up.*": "gpt_neox.layers.*.mlp.dense_h_to_4h.*",
    "blocks.*.ffn.down.*": "gpt_neox.layers.*.mlp.dense_4h_to_h.*",
    "final_norm.*": "gpt_neox.final_layer_norm.*",
    "head.out.*": "embed_out.*",
}
SKIP = {
    "gpt_neox.layers.*.attention.bias": "the causal mask",
    "gpt_neox.layers.*.attention.masked_bias": "the causal mask",
    "gpt_neox.layers.*.attention.rotary_emb.inv_freq": "RoPE's frequencies follow from the configuration",
}
SAME = {"embed_out.weight": "gpt_neox.embed_in.weight"}


def spec(c: Config) -> Tree:
    norm = {"kind": "layernorm", "eps": c.number("layer_norm_eps", 1e-5)}
    mixer = {"kind": "gqa", "heads": c.integer("num_attention_heads"), "position": "main"}
    mixer["bias"] = shared.biases(c, True)
    ffn = {"kind": "dense", "width": c.integer("intermediate_size"), "act": c.activation("hidden_act"), "bias": True}
    parallel = "own" if c.flag("use_parallel_residual", True) else "no"
    c.ignore("rotary_emb_base") if c.has("rope_parameters") else None
    return {
        "d_model": c.integer("hidden_size"),
        "vocab": c.integer("vocab_size"),
        "layers": c.integer("num_hidden_layers"),
        "context": c.integer("max_position_embeddings"),
        "positions": {"main": c.rope(theta=c.number("rotary_emb_base", 10_000.0), share=0.25)},
        "blocks": {"block": {"mixer": mixer, "ffn": ffn, "norm": {"kind": norm}, "parallel": parallel}},
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", False)},
    }


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    net, turn = outward.part(spec, "ffn", "dense"), outward.rope(spec, partial=True)
    return {
        **outward.sizes(spec, "gpt_neox", "GPTNeoXForCausalLM"),
        **turn,
        "rotary_emb_base": turn["rope_theta"],
        "rotary_pct": turn["partial_rotary_factor"],
        "intermediate_size": net.width,
        "hidden_act": outward.activation(net),
        "layer_norm_eps": outward.epsilon(spec, "layernorm"),
        "attention_bias": outward.biased(spec),
        "use_parallel_residual": len(spec.expand()[0]) == 1,
    }
