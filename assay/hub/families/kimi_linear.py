"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention without positions. arXiv 2510.26692."""

from __future__ import annotations

from typing import Any

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.families import deepseek_v3, glm4_moe
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Experts, Shaped
from assay.spec.model import ModelSpec

TYPES = ("kimi_linear",)
LINEAR = "linear_attention"
MOE, ATTENTION = "model.layers.*.block_sparse_moe", "model.layers.*.self_attn"
SAME, skip = shared.SAME, glm4_moe.skip
OTHERWISE = tuple((f".mlp.{x}_proj.weight", f".block_sparse_moe.{x}_proj.weight") for x in ("gate", "up", "down"))
"""transformers saves the network of a layer without experts under the name of one with them."""

KDA = {"decay_down": "f_a_proj", "decay_up": "f_b_proj", "gate_down": "g_a_proj", "gate_up": "g_b_proj"}
KDA |= {"beta": "b_proj", "norm": "o_norm"}
MLA = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
MLA |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj"}


OWN: Names = {
    **{f"blocks.*.mixer.{x}_conv": Depthwise(f"{ATTENTION}.{x}_conv1d.weight") for x in "qkv"},
    **{f"blocks.*.mixer.{ours}.*": f"{ATTENTION}.{theirs}.*" for ours, theirs in {**KDA, **MLA}.items()},
    "blocks.*.mixer.a_log": Shaped(f"{ATTENTION}.A_log", (1, 1, -1, 1)),
    "blocks.*.mixer.dt_bias": Shaped(f"{ATTENTION}.dt_bias", (-1,)),
    "blocks.*.ffn.router.map.weight": f"{MOE}.gate.weight",
    "blocks.*.ffn.router.select_bias": f"{MOE}.gate.e_score_correction_bias",
    "blocks.*.ffn.shared.gate.*": f"{MOE}.shared_experts.gate_proj.*",
    "blocks.*.ffn.shared.up.*": f"{MOE}.shared_experts.up_proj.*",
    "blocks.*.ffn.shared.down.*": f"{MOE}.shared_experts.down_proj.*",
    "blocks.*.ffn.gate": Experts(f"{MOE}.experts.#.w1.weight"),
    "blocks.*.ffn.up": Experts(f"{MOE}.experts.#.w3.weight"),
    "blocks.*.ffn.down": Experts(f"{MOE}.experts.#.w2.weight"),
}
NAMES = shared.over(OWN)
RENAMED = {"num_experts_per_tok": "num_experts_per_token", "norm_topk_prob": "moe_renormalize"}
RENAMED |= {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts", "n_group": "num_expert_group"}
"""DeepSeek-V3's keys -> its own."""


def spec(c: Config) -> Tree:
    """Files on the hub have what concerns the recurrence in `linear_attn_config`, with layers counted from one."""
    layers = c.integer("num_hidden_layers")
    c.must_be("mla_use_nope", True)
    c.must_be("moe_layer_freq", 1)
    c.ignore("rope_theta", "rope_scaling", "first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_layers")
    dense = c.integer("first_k_dense_replace", 1, least=0)
    ffns = c.each_layer("mlp_layer_types", layers, lambda i: "dense" if i < dense else "sparse")
    inner = c.inner("linear_attn_config") if c.has("linear_attn_config") else Config({}, c.where)
    norm = {"kind": shared.rmsnorm(c, eps=c.number("rms_norm_eps", 1e-5))}
    attention = deepseek_v3.attention(c)
    mixers = {LINEAR: delta(c, inner), shared.FULL: {**attention, "position": None, "scale": None}}
    made = {"dense": shared.gated(c), "sparse": mixture(c)}
    blocks, pattern = {}, []
    for kind, ffn in zip(kinds(c, inner, layers), ffns, strict=True):
        if kind not in mixers or ffn not in made:
            told = f"layer_types: {kind!r}; accepted: {', '.join(mixers)}"
            other = f"mlp_layer_types: {ffn!r}; accepted: {', '.join(made)}"
            raise ValueError(f"{c.where}: {other if kind in mixers else told}")
        name = f"{kind.removesuffix('_attention')}_{ffn}"
        blocks[name] = {"mixer": mixers[kind], "ffn": made[ffn], "norm": norm}
        pattern.append(name)
    c.ignore("max_position_embeddings")
    return {
        "d_model": c.integer("hidden_size"),
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer(c.either("model_max_length", "max_position_embeddings"), 1 << 20),
        "blocks": blocks,
        "pattern": tuple(pattern),
        "final_norm": norm["kind"],
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", False)},
    }


def kinds(c: Config, inner: Config, layers: int) -> tuple[str, ...]:
    full, linear = inner.listed("full_attn_layers", None), inner.listed("kda_layers", None)
    if c.has("layer_types") or full is None or linear is None:
        return c.each_layer("layer_types", layers, lambda i: shared.FULL if i and i % 4 == 0 else LINEAR)
    if sorted([*full, *linear]) != list(range(1, layers + 1)):
        raise ValueError(
            f"{inner.where}: full_attn_layers {full!r:.80}, kda_layers {linear!r:.80}; each layer of 1 to "
            f"{layers} is expected in one of them"
        )
    return tuple(shared.FULL if i + 1 in full else LINEAR for i in range(layers))


def delta(c: Config, inner: Config) -> Tree:
    c.must_be("hidden_act", "silu", why="that of the convolutions")
    return {
        "kind": "kda",
        "heads": inner.integer("num_heads", c.integer("linear_num_heads", 32)),
        "head_dim": inner.integer("head_dim", c.integer("linear_head_dim", 128)),
        "conv": inner.integer("short_conv_kernel_size", c.integer("linear_conv_kernel_dim", 4, least=2), least=2),
        "norm": shared.rmsnorm(c, eps=c.number("rms_norm_eps", 1e-5)),
    }


def mixture(c: Config) -> Tree:
    """DeepSeek-V3's, under names of its own."""
    c.must_be("moe_router_activation_func", "sigmoid")
    c.ignore("use_grouped_topk")
    act, width = c.activation("hidden_act"), c.integer("moe_intermediate_size", 1024)
    router: Tree = {
        "kind": "topk",
        "k": c.integer(c.either("num_experts_per_token", "num_experts_per_tok"), 8),
        "score": "sigmoid",
        "renormalise": c.flag(c.either("moe_renormalize", "norm_topk_prob"), True),
        "scale": c.number("routed_scaling_factor", 2.446),
        "select_bias": True,
        "balance": 0.0,
    }
    count, top = c.integer(c.either("num_expert_group", "n_group"), 1), c.integer("topk_group", 1)
    router["groups"] = {"count": count, "top": top} if count > 1 else None
    beside = c.integer(c.either("num_shared_experts", "n_shared_experts"), 1)
    both = {"kind": "gated", "width": beside * width, "act": act}
    experts: Any = c.integer(c.either("num_experts", "num_local_experts"), 256)
    return {"kind": "moe", "experts": experts, "width": width, "act": act, "router": router, "shared": both}


def hugging_face(spec: ModelSpec) -> Tree:
    mixer = outward.part(spec, "mixer", "kda")
    outward.untied(spec)
    linear, sparse = outward.kinds_at(spec, "mixer", "kda"), outward.kinds_at(spec, "ffn", "moe")
    found = {
        **outward.basics(spec, "kimi_linear", "KimiLinearForCausalLM"),
        **deepseek_v3.latent_outward(spec),
        **(glm4_moe.mixture_outward(spec) if sparse else dense_outward(spec)),
        "rms_norm_eps": outward.epsilon(spec),
        "model_max_length": spec.context,
        "layer_types": [LINEAR if i in linear else shared.FULL for i in range(spec.layers)],
        "mlp_layer_types": ["sparse" if i in sparse else "dense" for i in range(spec.layers)],
        "linear_num_heads": mixer.heads,
        "linear_head_dim": mixer.head_dim or spec.d_model // mixer.heads,
        "linear_conv_kernel_dim": mixer.conv or 4,
    }
    return {RENAMED.get(key, key): value for key, value in found.items()}


def dense_outward(spec: ModelSpec) -> Tree:
    net = outward.part(spec, "ffn", "gated")
    return {"intermediate_size": net.width, "hidden_act": outward.activation(net)}
