"""Llama 4, text: chunks in three of four layers and no positions in the fourth, experts whose input is scaled.

Meta 2025, "The Llama 4 herd".
"""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Packed, Pairs
from assay.spec.model import ModelSpec

TYPES = ("llama4_text", "llama4")
CHUNKED = "chunked_attention"
MLP = "model.layers.*.feed_forward"
SAME = shared.SAME
SKIP = {
    **shared.SKIP,
    "vision_model.**": "images are not read: the language model alone",
    "multi_modal_projector.**": "images are not read: the language model alone",
}
OTHERWISE = (("", "language_model."),)


def names(model: ModelSpec) -> Names:
    """Pairs of neighbours turn where there are positions; the maps of the layers without are as they are stored."""
    turned = {
        f"blocks.{i}.mixer.{x}.*": Pairs(f"model.layers.{i}.self_attn.{x}_proj.*")
        for i in range(model.layers)
        if any(getattr(branch.part, "position", None) is not None for _, _, branch in model.branches(i))
        for x in ("q", "k")
    }
    return shared.over({**turned, **NAMES})


NAMES: Names = {
    "blocks.*.ffn.router.map.*": f"{MLP}.router.*",
    "blocks.*.ffn.shared.gate.*": f"{MLP}.shared_expert.gate_proj.*",
    "blocks.*.ffn.shared.up.*": f"{MLP}.shared_expert.up_proj.*",
    "blocks.*.ffn.shared.down.*": f"{MLP}.shared_expert.down_proj.*",
    "blocks.*.ffn.{gate,up}": Packed(f"{MLP}.experts.gate_up_proj"),
    "blocks.*.ffn.down": Packed(f"{MLP}.experts.down_proj"),
    "blocks.*.ffn.gate.*": f"{MLP}.gate_proj.*",
    "blocks.*.ffn.up.*": f"{MLP}.up_proj.*",
    "blocks.*.ffn.down.*": f"{MLP}.down_proj.*",
}


def spec(c: Config) -> Tree:
    """Of the language model, also where a vision model stands beside it."""
    if c.text("model_type") == "llama4":
        c.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "tie_word_embeddings")
        c = c.inner("text_config")
    layers, every = c.integer("num_hidden_layers"), c.integer("no_rope_layer_interval", 4)
    turned = [bool(x) for x in c.listed("no_rope_layers", []) or [(i + 1) % every for i in range(layers)]]
    step = c.integer("interleave_moe_layer_step", 1)
    sparse = c.listed("moe_layers", None)
    sparse = list(range(step - 1, layers, step)) if sparse is None else sparse
    attention = c.each_layer("layer_types", layers, lambda i: CHUNKED if turned[i] else shared.FULL)
    norm = shared.rmsnorm(c, eps=c.number("rms_norm_eps", 1e-5))
    chunk = {"chunk": c.integer("attention_chunk_size", 8192)}
    sees = {CHUNKED: chunk, shared.FULL: {}}
    if unknown := sorted(set(attention) - sees.keys()):
        raise ValueError(f"{c.where}: layer_types: {unknown[0]!r}; accepted: {', '.join(sees)}")
    kinds = tuple(zip(attention, turned, (i in sparse for i in range(layers)), strict=True))
    ffns = {True: mixture(c), False: {**shared.gated(c), "width": c.integer("intermediate_size_mlp", 16384)}}
    blocks, pattern = {}, []
    for place, turns, mixed in kinds:
        name = f"{place.removesuffix('_attention')}_{'rope' if turns else 'nope'}_{'moe' if mixed else 'mlp'}"
        mixer = attend(c, turns, sees[place])
        blocks[name] = {"mixer": mixer, "ffn": ffns[mixed], "norm": {"kind": norm}}
        pattern.append(name)
    rope = c.rope(theta=500_000.0)
    return shared.decoder(c, blocks, tuple(pattern), final_norm=norm, positions={"main": rope})


def attend(c: Config, turns: bool, sees: Tree) -> Tree:
    bias = shared.biases(c)
    mixer = shared.attention(c, sees=sees, bias=bias, position="main" if turns else None)
    plain = {"kind": "rmsnorm", "weight": "none", "eps": c.number("rms_norm_eps", 1e-5)}
    if c.flag("use_qk_norm", True) and turns:
        mixer["qk_norm"] = {"norm": plain, "when": "after"}
    heat = {"gain": c.number("attn_scale", 0.1), "every": c.integer("floor_scale", 8192)}
    if c.flag("attn_temperature_tuning", True) and not turns:
        mixer["scores"] = {"temperature": heat}
    return mixer


def mixture(c: Config) -> Tree:
    width, act = c.integer("intermediate_size"), c.activation("hidden_act", "silu")
    router = {"kind": "topk", "k": c.integer("num_experts_per_tok", 1), "score": "sigmoid", "renormalise": False}
    router["balance"] = c.number("router_aux_loss_coef", 0.0)
    return {
        "kind": "moe",
        "experts": c.integer("num_local_experts"),
        "width": width,
        "act": act,
        "router": router,
        "shared": {"kind": "gated", "width": width, "act": act},
        "input_scaled": True,
    }


def hugging_face(spec: ModelSpec) -> Tree:
    mixers = [outward.part(spec, "mixer", "gqa", i) for i in range(spec.layers)]
    turned = [i for i, mixer in enumerate(mixers) if mixer.position is not None]
    sparse = [i for i in range(spec.layers) if outward.kind_at(spec, "ffn", i) == "moe"]
    chunks = [mixer.sees.chunk for mixer in mixers]
    moe = outward.part(spec, "ffn", "moe")
    router = outward.of_kind(moe.router, "ffn.router", "topk")
    dense = {"intermediate_size_mlp": outward.part(spec, "ffn", "gated").width} if len(sparse) < spec.layers else {}
    heat = next((mixer.scores.temperature for mixer in mixers if mixer.scores.temperature is not None), None)
    return {
        **outward.sizes(spec, "llama4_text", "Llama4ForCausalLM"),
        **outward.grouped(spec),
        **(outward.rope(spec, turned[0]) if turned else {"rope_theta": 500_000.0}),
        **dense,
        "rms_norm_eps": outward.epsilon(spec),
        "attention_bias": outward.biased(spec),
        "use_qk_norm": any(mixer.qk_norm is not None for mixer in mixers),
        "no_rope_layers": [int(i in turned) for i in range(spec.layers)],
        "layer_types": [shared.FULL if chunk is None else CHUNKED for chunk in chunks],
        "attention_chunk_size": next((chunk for chunk in chunks if chunk is not None), 8192),
        "attn_temperature_tuning": heat is not None,
        **({} if heat is None else {"attn_scale": heat.gain, "floor_scale": heat.every}),
        "moe_layers": sparse,
        "intermediate_size": moe.width,
        "hidden_act": outward.activation(moe),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": router.balance,
    }
