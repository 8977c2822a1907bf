"""Nemotron-H and Nemotron 3: one Mamba-2, attention, dense or expert layer after another, each alone in its block.

NVIDIA 2025, arXiv 2504.03624; the experts that work in a narrower space, arXiv 2512.20856.
"""

from __future__ import annotations

from typing import Any

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.families import glm4_moe
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Experts, Fused
from assay.spec.model import ModelSpec

TYPES = ("nemotron_h",)
SAME = {"lm_head.weight": "backbone.embeddings.weight"}
SKIP = {"mtp.**": "a layer that predicts a further token"}
OTHERWISE = (("backbone.", "model."),)
LINEAR = "linear_attention"
LETTERS = {"M": LINEAR, "E": "moe", "*": shared.FULL, "-": "mlp"}
OLDER = {"mamba": LINEAR, "attention": shared.FULL}
EXPERTS = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),
)
"""What says nothing where no layer has experts."""
LAYER = "backbone.layers.*.mixer"


def names(model: ModelSpec) -> Names:
    found: dict[str, Any] = {
        "embed.weight": "backbone.embeddings.weight",
        **{f"blocks.*.{name}_norm.*": "backbone.layers.*.norm.*" for name in ("mixer", "ffn")},
        "blocks.*.mixer.{z,x,b,c,dt}.*": Fused(f"{LAYER}.in_proj.*"),
        "blocks.*.mixer.conv": Depthwise(f"{LAYER}.conv1d.weight"),
        "blocks.*.mixer.conv_bias": f"{LAYER}.conv1d.bias",
        **{f"blocks.*.mixer.{name}": f"{LAYER}.{name}" for name in ("A_log", "D", "dt_bias")},
        "blocks.*.mixer.norm": f"{LAYER}.norm.weight",
        **{f"blocks.*.mixer.{name}.*": f"{LAYER}.{name}_proj.*" for name in "qkv"},
        "blocks.*.ffn.router.map.weight": f"{LAYER}.gate.weight",
        "blocks.*.ffn.router.select_bias": f"{LAYER}.gate.e_score_correction_bias",
        "blocks.*.ffn.into.*": f"{LAYER}.fc1_latent_proj.*",
        "blocks.*.ffn.back.*": f"{LAYER}.fc2_latent_proj.*",
        "final_norm.*": "backbone.norm_f.*",
        "head.out.*": "lm_head.*",
    }
    for name in ("up", "down"):
        found[f"blocks.*.ffn.{name}"] = Experts(f"{LAYER}.experts.#.{name}_proj.weight")
        found[f"blocks.*.ffn.{name}.*"] = f"{LAYER}.{name}_proj.*"
        found[f"blocks.*.ffn.shared.{name}.*"] = f"{LAYER}.shared_experts.{name}_proj.*"
    for layer in shared.layers_with(model, "mamba2"):
        found[f"blocks.{layer}.mixer.out.*"] = f"backbone.layers.{layer}.mixer.out_proj.*"
    return found | {"blocks.*.mixer.out.*": f"{LAYER}.o_proj.*"}


def spec(c: Config) -> Tree:
    kinds, norm = layers(c), {"kind": "rmsnorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    c.must_be("sliding_window")
    c.ignore("chunk_size", "mamba_chunk_size", "num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype")
    c.ignore("rescale_prenorm_residual", "residual_in_fp32", "moe_shared_expert_overlap", "num_hidden_layers")
    c.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "num_nextn_predict_layers")
    made = {
        LINEAR: lambda: {"mixer": state_space(c, norm)},
        shared.FULL: lambda: {"mixer": attention(c)},
        "mlp": lambda: {"ffn": dense(c, c.integer("intermediate_size"))},
        "moe": lambda: {"ffn": mixture(c)},
    }
    c.ignore("expand", "intermediate_size", *EXPERTS)
    blocks, pattern = shared.by_kind(c, kinds, made)
    for block in blocks.values():
        block["norm"] = {"kind": norm}
    return {
        "d_model": c.integer("hidden_size"),
        "vocab": c.integer("vocab_size"),
        "layers": len(kinds),
        "context": c.integer("max_position_embeddings", 4096),
        "blocks": blocks,
        "pattern": pattern,
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", False)},
    }


def layers(c: Config) -> tuple[str, ...]:
    """What each layer is: a list, or a letter for each."""
    given = c.listed(c.either("layers_block_type", "layer_types"), None)
    letters = c.text("hybrid_override_pattern", None)
    if given is not None:
        return tuple(OLDER.get(str(kind), str(kind)) for kind in given)
    if unknown := sorted(set(letters or "M") - LETTERS.keys()):
        raise ValueError(f"{c.where}: hybrid_override_pattern: {unknown[0]!r}; accepted: {', '.join(LETTERS)}")
    return tuple(LETTERS[letter] for letter in letters or "ME*-")


def state_space(c: Config, norm: Tree) -> Tree:
    """Steps are never below what the shortest of them was at first, whatever `time_step_limit` says."""
    c.must_be("mamba_hidden_act", "silu", "swish")
    c.ignore("time_step_floor", "time_step_limit", "mamba_proj_bias")
    low, high = c.positive("time_step_min", 1e-3), c.positive("time_step_max", 0.1)
    return {
        "kind": "mamba2",
        "heads": c.integer("mamba_num_heads", 128),
        "head_dim": c.integer("mamba_head_dim", 64),
        "state_size": c.integer("ssm_state_size", 128),
        "groups": c.integer(c.either("n_groups", "mamba_n_groups"), 8),
        "conv": c.integer(c.either("conv_kernel", "mamba_d_conv"), 4, least=2),
        "conv_bias": c.flag(c.either("use_conv_bias", "mamba_conv_bias"), True),
        "bias": c.flag("use_bias", False),
        "dt": {"low": low, "high": high, "at_least": low},
        "norm": {"eps": norm["eps"]},
    }


def attention(c: Config) -> Tree:
    c.must_be("attention_bias", False, why="transformers has no biases there")
    return shared.attention(c, head_dim=c.integer("head_dim", 128), position=None)


def dense(c: Config, width: int) -> Tree:
    act, bias = c.activation("mlp_hidden_act", "relu2"), c.flag("mlp_bias", False)
    return {"kind": "dense", "width": width, "act": act, "bias": bias}


def mixture(c: Config) -> Tree:
    """Experts without a gate; the network beside them has a width of its own."""
    c.must_be("mlp_bias", False, why="its experts have none")
    both = dense(c, c.integer("moe_shared_expert_intermediate_size"))
    return {
        "kind": "moe",
        "experts": c.integer("n_routed_experts"),
        "width": c.integer("moe_intermediate_size"),
        "act": both["act"],
        "gated": False,
        "latent": c.integer("moe_latent_size", None),
        "router": glm4_moe.router(c),
        "shared": both,
    }


def hugging_face(spec: ModelSpec) -> Tree:
    outward.untied(spec)
    kinds = [letter(spec, i) for i in range(spec.layers)]
    mixer: Any = outward.part(spec, "mixer", "mamba2")
    found = {
        **outward.basics(spec, "nemotron_h", "NemotronHForCausalLM"),
        "layers_block_type": kinds,
        "layer_norm_epsilon": outward.epsilon(spec),
        "mamba_num_heads": mixer.count(spec.site(0)),
        "mamba_head_dim": mixer.head_dim,
        "ssm_state_size": mixer.state_size,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "time_step_min": mixer.dt.low,
        "time_step_max": mixer.dt.high,
    }
    if shared.FULL in kinds:
        found |= outward.grouped(spec) | {"num_attention_heads": outward.part(spec, "mixer", "gqa").heads}
    if "mlp" in kinds:
        net = outward.part(spec, "ffn", "dense")
        found |= {"intermediate_size": net.width, "mlp_hidden_act": outward.activation(net), "mlp_bias": net.bias}
    return found | (mixture_outward(spec) if "moe" in kinds else {})


def mixture_outward(spec: ModelSpec) -> Tree:
    """The keys of `mixture`."""
    moe = outward.part(spec, "ffn", "moe")
    return {
        **glm4_moe.router_outward(moe),
        "mlp_hidden_act": outward.activation(moe),
        "n_shared_experts": 1,
        "moe_intermediate_size": moe.width,
        "moe_shared_expert_intermediate_size": outward.of_kind(moe.shared, "ffn.shared", "dense").width,
        "moe_latent_size": moe.latent,
    }


def letter(spec: ModelSpec, layer: int) -> str:
    """What one layer is. ValueError for one that is not a single part of these kinds."""
    found = tuple(outward.kind_at(spec, name, layer) for name in ("mixer", "ffn"))
    kinds = {("mamba2", None): LINEAR, ("gqa", None): shared.FULL, (None, "dense"): "mlp", (None, "moe"): "moe"}
    if found not in kinds:
        raise ValueError(f"blocks.{layer}: {found[0]!r} and {found[1]!r}; one of mamba2, gqa, dense, moe is expected")
    return kinds[found]
