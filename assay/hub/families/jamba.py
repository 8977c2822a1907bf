"""Jamba: one attention layer among Mamba layers, experts in every other one, no positions. arXiv 2403.19887."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Experts, Fused
from assay.spec.model import ModelSpec

TYPES = ("jamba",)
SKIP, SAME = shared.SKIP, shared.SAME
MIXER, MAMBA, FFN = "blocks.*.mixer", "model.layers.*.mamba", "model.layers.*.feed_forward"


def names(model: ModelSpec) -> Names:
    own: Names = {
        "blocks.*.mixer_norm.*": "model.layers.*.input_layernorm.*",
        f"{MIXER}.{{x,z}}.*": Fused(f"{MAMBA}.in_proj.*"),
        f"{MIXER}.select.*": f"{MAMBA}.x_proj.*",
        f"{MIXER}.conv": Depthwise(f"{MAMBA}.conv1d.weight"),
        f"{MIXER}.conv_bias": f"{MAMBA}.conv1d.bias",
        f"{MIXER}.dt_weight": f"{MAMBA}.dt_proj.weight",
        f"{MIXER}.dt_bias": f"{MAMBA}.dt_proj.bias",
        f"{MIXER}.a_log": f"{MAMBA}.A_log",
        f"{MIXER}.d": f"{MAMBA}.D",
        **{f"{MIXER}.{n}_norm.*": f"{MAMBA}.{n}_layernorm.*" for n in ("dt", "b", "c")},
        **{f"blocks.{i}.mixer.out.*": f"model.layers.{i}.mamba.out_proj.*" for i in shared.layers_with(model, "mamba")},
        "blocks.*.ffn_norm.*": "model.layers.*.pre_ff_layernorm.*",
        "blocks.*.ffn.router.map.*": f"{FFN}.router.*",
        **{f"blocks.*.ffn.{n}": Experts(f"{FFN}.experts.#.{n}_proj.weight") for n in ("gate", "up", "down")},
        **{f"blocks.*.ffn.{n}.*": f"{FFN}.{n}_proj.*" for n in ("gate", "up", "down")},
        "final_norm.*": "model.final_layernorm.*",
    }
    return shared.over(own)


def spec(c: Config) -> Tree:
    norm, layers = shared.rmsnorm(c), c.integer("num_hidden_layers")
    mixers = {"mamba": mamba(c, norm), "attention": shared.attention(c, position=None)}
    ffns = {"dense": shared.gated(c), "moe": mixture(c)}
    attention = periodic(c, "attn_layer", (8, 4), layers)
    sparse = periodic(c, "expert_layer", (2, 1), layers) if ffns["moe"]["experts"] > 1 else set()
    blocks, pattern = {}, []
    for i in range(layers):
        mixer, ffn = "attention" if i in attention else "mamba", "moe" if i in sparse else "dense"
        blocks[f"{mixer}_{ffn}"] = {"mixer": mixers[mixer], "ffn": ffns[ffn], "norm": {"kind": norm}}
        pattern.append(f"{mixer}_{ffn}")
    c.must_be("mamba_inner_layernorms", True)
    c.must_be("sliding_window")
    c.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    c.ignore("num_logits_to_keep", "calc_logits_for_entire_prompt")
    return shared.decoder(c, blocks, tuple(pattern), final_norm=norm)


def periodic(c: Config, name: str, usual: tuple[int, int], layers: int) -> set[int]:
    """The layers that `NAME_period` and `NAME_offset` pick."""
    period = c.integer(f"{name}_period", usual[0])
    return set(range(c.integer(f"{name}_offset", usual[1], least=0), layers, period))


def mamba(c: Config, norm: Tree) -> Tree:
    auto = c.values.get("mamba_dt_rank", "auto") == "auto"
    c.ignore("mamba_dt_rank") if auto else None
    return {
        "kind": "mamba",
        "width": c.integer("mamba_expand", 2) * c.integer("hidden_size"),
        "state_dim": c.integer("mamba_d_state", 16),
        "dt_rank": None if auto else c.integer("mamba_dt_rank"),
        "conv": c.integer("mamba_d_conv", 4, least=2),
        "conv_bias": c.flag("mamba_conv_bias", True),
        "bias": c.flag("mamba_proj_bias", False),
        "act": c.activation("hidden_act", "silu"),
        "norm": norm,
    }


def mixture(c: Config) -> Tree:
    """Shares are those of a softmax over all experts, and do not sum to one."""
    return {
        "kind": "moe",
        "experts": c.integer(c.either("num_experts", "num_local_experts"), 16),
        "width": c.integer("intermediate_size"),
        "act": c.activation("hidden_act", "silu"),
        "router": {
            "kind": "topk",
            "k": c.integer("num_experts_per_tok", 2),
            "renormalise": False,
            "balance": c.number("router_aux_loss_coef", 0.001),
        },
    }


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    mixer, net = outward.part(spec, "mixer", "mamba"), outward.at(spec, "ffn", 0)
    sparse = outward.kinds_at(spec, "ffn", "moe")
    width = mixer.channels(spec.site(0))
    if net is None or width % spec.d_model:
        raise ValueError(f"blocks: layers with a network and a mamba of a multiple of {spec.d_model} are expected")
    found = {
        **outward.sizes(spec, "jamba", "JambaForCausalLM"),
        "num_key_value_heads": outward.part(spec, "mixer", "gqa").groups,
        "rms_norm_eps": outward.epsilon(spec),
        "hidden_act": outward.activation(net),
        "intermediate_size": net.width,
        **repeated("attn_layer", outward.kinds_at(spec, "mixer", "gqa"), spec.layers),
        **repeated("expert_layer", sparse, spec.layers),
        "num_experts": 1,
        "mamba_expand": width // spec.d_model,
        "mamba_d_state": mixer.state_dim,
        "mamba_dt_rank": mixer.rank(spec.site(0)),
        "mamba_d_conv": mixer.conv,
        "mamba_conv_bias": mixer.conv_bias,
        "mamba_proj_bias": mixer.bias,
    }
    return found | (mixture_outward(spec) if sparse else {})


def mixture_outward(spec: ModelSpec) -> Tree:
    moe = outward.part(spec, "ffn", "moe")
    router = outward.of_kind(moe.router, "ffn.router", "topk")
    found = {"num_experts": moe.experts, "num_experts_per_tok": router.k}
    return found | {"intermediate_size": moe.width, "router_aux_loss_coef": router.balance}


def repeated(name: str, chosen: list[int], layers: int) -> Tree:
    """`NAME_period` and `NAME_offset` of these layers. ValueError where they are not one in every so many."""
    for period in range(1, layers + 2):
        for offset in range(period):
            if list(range(offset, layers, period)) == chosen:
                return {f"{name}_period": period, f"{name}_offset": offset}
    raise ValueError(f"{name}_period: layers {chosen}; one in every so many is expected")
