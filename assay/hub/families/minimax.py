"""MiniMax: lightning attention in most layers, mixtures of experts, and a stream that is normalised itself.
arXiv 2501.08313."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Experts, FusedHeads
from assay.spec.model import ModelSpec

TYPES = ("minimax",)
LINEAR = "linear_attention"
LAYER = "model.layers.*"
NAMES = shared.over(
    {
        "blocks.*.residual0.norm.*": f"{LAYER}.input_layernorm.*",
        "blocks.*.residual1.norm.*": f"{LAYER}.post_attention_layernorm.*",
        "blocks.*.ffn.router.map.weight": f"{LAYER}.block_sparse_moe.gate.weight",
        "blocks.*.ffn.gate": Experts(f"{LAYER}.block_sparse_moe.experts.#.w1.weight"),
        "blocks.*.ffn.up": Experts(f"{LAYER}.block_sparse_moe.experts.#.w3.weight"),
        "blocks.*.ffn.down": Experts(f"{LAYER}.block_sparse_moe.experts.#.w2.weight"),
    }
)
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
SKIP = shared.SKIP | {f"{LAYER}.self_attn.{name}": "decays follow from the configuration" for name in TABLES}
SAME = shared.SAME


def names(spec: ModelSpec) -> Names:
    """Lightning attention's own names, in the layers that have it."""
    own: dict[str, str | FusedHeads | Experts] = {}
    for site, _, branch in (found for i in range(spec.layers) for found in spec.branches(i)):
        if branch.part.kind_name() == "lightning":
            attn = f"model.layers.{site.layer}.self_attn"
            own |= {
                f"{site.name}.{{q,k,v}}.*": FusedHeads(f"{attn}.qkv_proj.*"),
                f"{site.name}.gate_map.*": f"{attn}.output_gate.*",
                f"{site.name}.norm.*": f"{attn}.norm.*",
                f"{site.name}.out.*": f"{attn}.out_proj.*",
            }
    return shared.over(own, NAMES)


def spec(c: Config) -> Tree:
    layers = c.integer("num_hidden_layers")
    kinds = c.each_layer("layer_types", layers, lambda i: shared.FULL if (i + 1) % 2 else LINEAR)
    heads, norm = c.integer("num_attention_heads"), shared.rmsnorm(c)
    c.ignore("block_size")
    # The norm inside it has transformers' default epsilon, whatever rms_norm_eps says.
    lightning: Tree = {
        "kind": "lightning",
        "heads": heads,
        "head_dim": c.head_size(),
        "act": c.activation("hidden_act"),
    }
    lightning["norm"] = {"kind": "rmsnorm", "eps": 1e-6}
    router = {"kind": "topk", "k": c.integer("num_experts_per_tok")}
    moe = {
        "kind": "moe",
        "experts": c.integer(c.either("num_local_experts", "num_experts")),
        "width": c.integer("intermediate_size"),
        "act": c.activation("hidden_act"),
        "router": router | {"balance": c.number("router_aux_loss_coef", 0.0)},
    }

    def residual(place: str) -> Tree:
        alpha, beta = (c.number(f"{place}_{name}_factor", 1.0) for name in ("alpha", "beta"))
        return {"kind": "normed", "norm": norm, "alpha": alpha, "beta": beta}

    def block(mixer: Tree, place: str) -> Tree:
        first = {"branches": [{"mixer": mixer, "name": "mixer"}], "residual": residual(place)}
        return {"stages": [first, {"branches": [{"ffn": moe, "name": "ffn"}], "residual": residual("mlp")}]}

    full = block(shared.attention(c, sees=shared.window_if_any(c)), "full_attn")
    linear = block(lightning, "linear_attn")
    blocks, pattern = shared.by_kind(c, kinds, {shared.FULL: lambda: full, LINEAR: lambda: linear})
    return shared.decoder(c, blocks, pattern, positions={"main": c.rope(theta=1e6)})


def hugging_face(spec: ModelSpec) -> Tree:
    moe, linear = outward.part(spec, "ffn", "moe"), outward.kinds_at(spec, "mixer", "lightning")
    full = outward.kinds_at(spec, "mixer", "gqa")
    found = {
        **outward.decoder(spec, "minimax", "MiniMaxForCausalLM", ffn="moe"),
        **outward.rope(spec),
        "layer_types": [LINEAR if i in linear else shared.FULL for i in range(spec.layers)],
        "sliding_window": outward.part(spec, "mixer", "gqa").sees.window,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": outward.of_kind(moe.router, "ffn.router", "topk").k,
        "router_aux_loss_coef": moe.router.balance,
    }
    for name, layer, stage in (("full_attn", full, 0), ("linear_attn", linear, 0), ("mlp", range(spec.layers), 1)):
        for where in list(layer)[:1]:
            joined = [stage.residual for stage in spec.expand()[where]]
            residual = outward.of_kind(joined[stage] if stage < len(joined) else None, "residual", "normed")
            found |= {f"{name}_alpha_factor": residual.alpha, f"{name}_beta_factor": residual.beta}
    return found
