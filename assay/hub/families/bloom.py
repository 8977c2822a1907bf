"""BLOOM: ALiBi, and a LayerNorm on the embedding. BigScience 2022, arXiv 2211.05100."""

from __future__ import annotations

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.rules import FusedHeads
from assay.spec.model import ModelSpec

TYPES = ("bloom",)
NAMES = {
    "embed.weight": "transformer.word_embeddings.weight",
    "embed.norm.*": "transformer.word_embeddings_layernorm.*",
    "blocks.*.mixer_norm.*": "transformer.h.*.input_layernorm.*",
    "blocks.*.mixer.{q,k,v}.*": FusedHeads("transformer.h.*.self_attention.query_key_value.*"),
    "blocks.*.mixer.out.*": "transformer.h.*.self_attention.dense.*",
    "blocks.*.ffn_norm.*": "transformer.h.*.post_attention_layernorm.*",
    "blocks.*.ffn.up.*": "transformer.h.*.mlp.dense_h_to_4h.*",
    "blocks.*.ffn.down.*": "transformer.h.*.mlp.dense_4h_to_h.*",
    "final_norm.*": "transformer.ln_f.*",
    "head.out.*": "lm_head.*",
}
SAME = {"lm_head.weight": "transformer.word_embeddings.weight"}
OTHERWISE = (("transformer.", ""),)
CONTEXT = 2048  # what it was trained on; ALiBi sets no end, and its configurations name none


def spec(c: Config) -> Tree:
    d = c.integer(c.either("hidden_size", "n_embed"))
    heads = c.integer(c.either("n_head", "num_attention_heads"))
    layers = c.integer(c.either("n_layer", "num_hidden_layers"))
    norm = {"kind": "layernorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    c.must_be("apply_residual_connection_post_layernorm", False)
    c.ignore("slow_but_exact", "n_embed", "num_attention_heads", "num_hidden_layers", "offset_alibi", "skip_bias_add")
    c.ignore("skip_bias_add_qkv", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")
    c.ignore("unk_token_id", "n_inner")
    mixer = {"kind": "gqa", "heads": heads, "position": "main", "bias": "all"}
    ffn = {"kind": "dense", "width": 4 * d, "act": "gelu_tanh", "bias": True}
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer("seq_length", CONTEXT),
        "positions": {"main": {"kind": "alibi", "heads": heads}},
        "embed": {"kind": "token", "norm": norm},
        "blocks": {"block": {"mixer": mixer, "ffn": ffn, "norm": {"kind": norm}}},
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", True)},
    }


def hugging_face(spec: ModelSpec) -> Tree:
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": spec.vocab,
        "hidden_size": spec.d_model,
        "n_layer": spec.layers,
        "n_head": outward.part(spec, "mixer", "gqa").heads,
        "seq_length": spec.context,
        "layer_norm_epsilon": outward.epsilon(spec, "layernorm"),
        "tie_word_embeddings": outward.of_kind(spec.head, "head", "lm").tie,
    }
