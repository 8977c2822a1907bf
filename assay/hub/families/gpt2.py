"""GPT-2: learned positions, LayerNorm, biases everywhere. Radford et al. 2019."""

from __future__ import annotations

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.rules import Fused, Transposed
from assay.spec.model import ModelSpec

TYPES = ("gpt2",)
NAMES = {
    "embed.weight": "transformer.wte.weight",
    "positions.main.*": "transformer.wpe.weight",
    "blocks.*.mixer_norm.*": "transformer.h.*.ln_1.*",
    "blocks.*.mixer.{q,k,v}.*": Fused("transformer.h.*.attn.c_attn.*", transposed=True),
    "blocks.*.mixer.out.*": Transposed("transformer.h.*.attn.c_proj.*"),
    "blocks.*.ffn_norm.*": "transformer.h.*.ln_2.*",
    "blocks.*.ffn.up.*": Transposed("transformer.h.*.mlp.c_fc.*"),
    "blocks.*.ffn.down.*": Transposed("transformer.h.*.mlp.c_proj.*"),
    "final_norm.*": "transformer.ln_f.*",
    "head.out.*": "lm_head.*",
}
SKIP = {
    "transformer.h.*.attn.bias": "the causal mask",
    "transformer.h.*.attn.masked_bias": "the causal mask",
    "h.*.attn.bias": "the causal mask",
}
SAME = {"lm_head.weight": "transformer.wte.weight"}
OTHERWISE = (("transformer.", ""),)


def spec(c: Config) -> Tree:
    d, norm = c.integer("n_embd"), {"kind": "layernorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    c.must_be("add_cross_attention", False)
    c.must_be("scale_attn_weights", True)
    c.must_be("scale_attn_by_inverse_layer_idx", False)
    c.ignore("reorder_and_upcast_attn", "n_ctx", *(f"summary_{x}" for x in SUMMARY))
    mixer = {"kind": "gqa", "heads": c.integer("n_head"), "bias": "all"}
    act = c.activation("activation_function", "gelu_new")
    ffn = {"kind": "dense", "width": c.integer("n_inner", 4 * d), "act": act, "bias": True}
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": c.integer("n_layer"),
        "context": c.integer("n_positions"),
        "positions": {"main": "learned"},
        "blocks": {"block": {"mixer": mixer, "ffn": ffn, "norm": {"kind": norm}}},
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", True)},
    }


SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    net = outward.part(spec, "ffn", "dense")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": spec.vocab,
        "n_embd": spec.d_model,
        "n_layer": spec.layers,
        "n_head": outward.part(spec, "mixer", "gqa").heads,
        "n_inner": net.width,
        "n_positions": spec.context,
        "activation_function": "gelu_new" if net.act == "gelu_tanh" else outward.activation(net),
        "layer_norm_epsilon": outward.epsilon(spec, "layernorm"),
        "tie_word_embeddings": outward.of_kind(spec.head, "head", "lm").tie,
    }
