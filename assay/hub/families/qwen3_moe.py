"""Qwen3's mixtures of many small experts. arXiv 2505.09388."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.spec.model import ModelSpec

TYPES = ("qwen3_moe",)
NAMES = shared.over(shared.EXPERTS)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    norm = shared.rmsnorm(c)
    router = {"kind": "topk", "k": c.integer("num_experts_per_tok"), "renormalise": c.flag("norm_topk_prob", False)}
    router["balance"] = c.number("router_aux_loss_coef", 0.0)
    moe = {
        "kind": "moe",
        "experts": c.integer(c.either("num_experts", "num_local_experts")),
        "width": c.integer("moe_intermediate_size"),
        "act": c.activation("hidden_act"),
        "router": router,
    }
    mixer = shared.attention(c, qk_norm={"norm": norm}, bias=shared.biases(c))
    if c.flag("use_sliding_window", False) and c.has("sliding_window"):
        mixer["sees"] = shared.window(c)
    c.ignore("sliding_window", "max_window_layers")
    every, dense = c.integer("decoder_sparse_step", 1), c.listed("mlp_only_layers", [])

    def sparse(layer: int) -> bool:
        return layer not in dense and (layer + 1) % every == 0

    made = {
        "dense": lambda: {"mixer": mixer, "ffn": shared.gated(c), "norm": {"kind": norm}},
        "sparse": lambda: {"mixer": mixer, "ffn": moe, "norm": {"kind": norm}},
    }
    kinds = tuple("sparse" if sparse(i) else "dense" for i in range(c.integer("num_hidden_layers")))
    c.ignore("intermediate_size")
    blocks, pattern = shared.by_kind(c, kinds, made)
    return shared.decoder(c, blocks, pattern, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    kinds = [outward.kind_at(spec, "ffn", layer) for layer in range(spec.layers)]
    dense = [i for i, kind in enumerate(kinds) if kind == "gated"]
    first = kinds.index("moe") if "moe" in kinds else 0
    moe, width = outward.part(spec, "ffn", "moe", first), outward.window(spec)
    router = outward.of_kind(moe.router, f"blocks.{first}.ffn.router", "topk")
    plain = outward.part(spec, "ffn", "gated", dense[0]) if dense else moe
    return {
        **outward.sizes(spec, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **outward.rope(spec),
        **outward.grouped(spec),
        "hidden_act": outward.activation(moe),
        "rms_norm_eps": outward.epsilon(spec),
        "attention_bias": outward.biased(spec),
        "intermediate_size": plain.width,
        "moe_intermediate_size": moe.width,
        "num_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "router_aux_loss_coef": router.balance,
        "mlp_only_layers": dense,
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": 0,
    }
