"""RecurrentGemma: two gated recurrences to each local attention. Botev et al. 2024, arXiv 2404.07839."""

from __future__ import annotations

import torch

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Depthwise
from assay.spec.model import ModelSpec

TYPES = ("recurrent_gemma",)
SAME = shared.SAME
SKIP = {"model.layers.*.temporal_block.rotary_emb.inv_freq": "RoPE's frequencies follow from the configuration"}
CONTEXT = 8192  # what it was trained on; neither a recurrence nor a window sets an end, and no key names one
TIME, CHANNEL = "model.layers.*.temporal_block", "model.layers.*.mlp_block"


def names(model: ModelSpec) -> Names:
    layers = shared.layers_with(model, "rglru")
    outs = {f"blocks.{i}.mixer.out.*": f"model.layers.{i}.temporal_block.linear_out.*" for i in layers}
    return {
        **shared.EMBED,
        "blocks.*.mixer_norm.*": "model.layers.*.temporal_pre_norm.*",
        **outs,
        "blocks.*.mixer.x.*": f"{TIME}.linear_x.*",
        "blocks.*.mixer.y.*": f"{TIME}.linear_y.*",
        "blocks.*.mixer.conv": Depthwise(f"{TIME}.conv_1d.weight"),
        "blocks.*.mixer.conv_bias": f"{TIME}.conv_1d.bias",
        "blocks.*.mixer.rate": f"{TIME}.rg_lru.recurrent_param",
        "blocks.*.mixer.input": f"{TIME}.rg_lru.input_gate_weight",
        "blocks.*.mixer.input_bias": f"{TIME}.rg_lru.input_gate_bias",
        "blocks.*.mixer.recur": f"{TIME}.rg_lru.recurrent_gate_weight",
        "blocks.*.mixer.recur_bias": f"{TIME}.rg_lru.recurrent_gate_bias",
        "blocks.*.mixer.q.*": f"{TIME}.q_proj.*",
        "blocks.*.mixer.k.*": f"{TIME}.k_proj.*",
        "blocks.*.mixer.v.*": f"{TIME}.v_proj.*",
        "blocks.*.mixer.out.*": f"{TIME}.o_proj.*",
        "blocks.*.ffn_norm.*": "model.layers.*.channel_pre_norm.*",
        "blocks.*.ffn.gate.*": f"{CHANNEL}.gate_proj.*",
        "blocks.*.ffn.up.*": f"{CHANNEL}.up_proj.*",
        "blocks.*.ffn.down.*": f"{CHANNEL}.down_proj.*",
        "final_norm.*": "model.final_norm.*",
        "head.out.*": "lm_head.*",
    }


def spec(c: Config) -> Tree:
    d, layers = c.integer("hidden_size"), c.integer("num_hidden_layers")
    kinds = c.listed("block_types", ["recurrent", "recurrent", "attention"])
    if not kinds or any(kind not in ("recurrent", "attention") for kind in kinds):
        raise ValueError(f"{c.where}: block_types: {kinds!r:.80}; a list of 'recurrent' and 'attention' is expected")
    norm = shared.rmsnorm(c, weight="plus_one")
    made = {"recurrent": recurrent(c, d), "attention": attention(c)}
    net = {"kind": "gated", "width": c.integer("intermediate_size", 3 * d, least=2) // 2, "bias": True}
    net["act"] = c.activation("hidden_activation", "gelu_pytorch_tanh")
    c.ignore("w_init_variance_scale", "final_w_init_variance_scale", "rope_parameters", "layer_types")
    blocks = {kind: {"mixer": made[kind], "ffn": net, "norm": {"kind": norm}} for kind in made if kind in kinds}
    # transformers rounds this factor to bfloat16.
    scale = float(torch.tensor(d**0.5, dtype=torch.bfloat16))
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer("max_position_embeddings", CONTEXT),
        "positions": {"main": c.rope(share=0.5)} if "attention" in kinds else {},
        "embed": {"kind": "token", "scale": scale},
        "blocks": blocks,
        "pattern": tuple(kinds),
        "final_norm": norm,
        "head": {
            "kind": "lm",
            "tie": c.flag("tie_word_embeddings", True),
            "softcap": c.number("logits_soft_cap", 30.0),
        },
    }


def recurrent(c: Config, d: int) -> Tree:
    return {
        "kind": "rglru",
        "heads": c.integer("num_attention_heads"),
        "width": c.integer("lru_width", d),
        "conv": c.integer("conv1d_width", 4, least=2),
        "act": c.activation("hidden_activation", "gelu_pytorch_tanh"),
    }


def attention(c: Config) -> Tree:
    bias = "all" if c.flag("attention_bias", False) else "out"
    return shared.attention(c, sees={"window": c.integer("attention_window_size", 2048)}, bias=bias)


def hugging_face(spec: ModelSpec) -> Tree:
    """A network is half as wide as its configuration says."""
    mixer, net = outward.part(spec, "mixer", "rglru"), outward.part(spec, "ffn", "gated")
    attends = outward.kinds_at(spec, "mixer", "gqa")
    found = {
        **outward.basics(spec, "recurrent_gemma", "RecurrentGemmaForCausalLM"),
        "num_attention_heads": mixer.heads,
        "lru_width": mixer.channels(spec.site(0)),
        "conv1d_width": mixer.conv,
        "block_types": shortest(["attention" if i in attends else "recurrent" for i in range(spec.layers)]),
        "intermediate_size": 2 * net.width,
        "hidden_activation": outward.activation(net),
        "rms_norm_eps": outward.epsilon(spec),
        "logits_soft_cap": outward.of_kind(spec.head, "head", "lm").softcap,
    }
    if attends:
        outward.whole_heads(spec, by_width=True)
        attention = outward.part(spec, "mixer", "gqa")
        found |= outward.rope(spec, partial=True) | {"num_key_value_heads": attention.groups}
        found |= {"attention_bias": outward.biased(spec), "attention_window_size": attention.sees.window}
    return found


def shortest(kinds: list[str]) -> list[str]:
    """What a list repeats, to its end."""
    size = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return kinds[:size]
