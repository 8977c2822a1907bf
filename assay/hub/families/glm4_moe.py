"""GLM-4.5: sigmoid routing with a selection bias, a shared expert, half of each head turned. arXiv 2508.06471."""

from __future__ import annotations

from typing import Any

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("glm4_moe",)
NAMES = shared.over(
    {
        **shared.EXPERTS,
        "blocks.*.ffn.router.select_bias": "model.layers.*.mlp.gate.e_score_correction_bias",
        "blocks.*.ffn.shared.gate.*": "model.layers.*.mlp.shared_experts.gate_proj.*",
        "blocks.*.ffn.shared.up.*": "model.layers.*.mlp.shared_experts.up_proj.*",
        "blocks.*.ffn.shared.down.*": "model.layers.*.mlp.shared_experts.down_proj.*",
    }
)
SAME = shared.SAME


def skip(model: ModelSpec) -> dict[str, str]:
    return {**shared.SKIP, f"model.layers.{model.layers}.**": "a layer that predicts a further token"}


def spec(c: Config) -> Tree:
    norm = shared.rmsnorm(c, eps=c.number("rms_norm_eps", 1e-5))
    moe = mixture(c)
    mixer = shared.attention(c, bias="qkv" if c.flag("attention_bias", False) else "none")
    mixer["qk_norm"] = {"norm": norm} if c.flag("use_qk_norm", False) else None
    made = {
        "dense": lambda: {"mixer": mixer, "ffn": shared.gated(c), "norm": {"kind": norm}},
        "sparse": lambda: {"mixer": mixer, "ffn": moe, "norm": {"kind": norm}},
    }
    first = c.integer("first_k_dense_replace", 1, least=0)
    kinds = tuple("dense" if i < first else "sparse" for i in range(c.integer("num_hidden_layers")))
    c.ignore("intermediate_size", "num_nextn_predict_layers", "num_mtp_layers")
    blocks, pattern = shared.by_kind(c, kinds, made)
    return shared.decoder(c, blocks, pattern, final_norm=norm, positions={"main": c.rope(share=0.5)})


def mixture(c: Config) -> Tree:
    """The experts of DeepSeek-V3 and of those who kept its names."""
    experts, width, act = c.integer("n_routed_experts"), c.integer("moe_intermediate_size"), c.activation("hidden_act")
    beside = c.integer("n_shared_experts", 1, least=0)
    both = {"kind": "gated", "width": beside * width, "act": act} if beside else None
    return {"kind": "moe", "experts": experts, "width": width, "act": act, "router": router(c), "shared": both}


def router(c: Config) -> Tree:
    """Sigmoids with a bias that only selects, of the best groups."""
    count, top = c.integer("n_group", 1), c.integer("topk_group", 1)
    return {
        "kind": "topk",
        "k": c.integer("num_experts_per_tok"),
        "score": "sigmoid",
        "renormalise": c.flag("norm_topk_prob", True),
        "scale": c.number("routed_scaling_factor", 1.0),
        "groups": {"count": count, "top": top} if count > 1 else None,
        "select_bias": True,
        "balance": 0.0,
    }


def hugging_face(spec: ModelSpec) -> Tree:
    mixer = outward.part(spec, "mixer", "gqa")
    return {
        **outward.sizes(spec, "glm4_moe", "Glm4MoeForCausalLM"),
        **outward.rope(spec, partial=True),
        **outward.grouped(spec),
        "rms_norm_eps": outward.epsilon(spec),
        "attention_bias": mixer.bias == "qkv",
        "use_qk_norm": mixer.qk_norm is not None,
        **mixture_outward(spec),
    }


def mixture_outward(spec: ModelSpec) -> Tree:
    """The keys of `mixture`, and of the dense layers before the first with experts; `intermediate_size` is the
    experts' where there is none."""
    moe, first = outward.part(spec, "ffn", "moe"), outward.first(spec, "ffn", "moe")
    plain = outward.part(spec, "ffn", "gated") if outward.kinds_at(spec, "ffn", "gated") else moe
    beside = 0 if moe.shared is None else outward.of_kind(moe.shared, "shared", "gated").width // moe.width
    return {
        "hidden_act": outward.activation(moe),
        "intermediate_size": plain.width,
        "first_k_dense_replace": first,
        "num_nextn_predict_layers": 0,
        "moe_intermediate_size": moe.width,
        "n_shared_experts": beside,
        **router_outward(moe),
    }


def router_outward(moe: Any) -> Tree:
    """The keys of `router`, and how many experts there are."""
    router = outward.of_kind(moe.router, "ffn.router", "topk")
    groups = router.groups
    return {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scale,
        "n_group": 1 if groups is None else groups.count,
        "topk_group": 1 if groups is None else groups.top,
    }
