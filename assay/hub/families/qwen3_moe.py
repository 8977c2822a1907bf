"""Qwen3's mixtures of many small experts. arXiv 2505.09388."""

from __future__ import annotations

from assay.hub import shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Experts

TYPES = ("qwen3_moe",)
NAMES = shared.over(
    {
        "blocks.*.ffn.router.map.weight": "model.layers.*.mlp.gate.weight",
        "blocks.*.ffn.gate": Experts("model.layers.*.mlp.experts.#.gate_proj.weight"),
        "blocks.*.ffn.up": Experts("model.layers.*.mlp.experts.#.up_proj.weight"),
        "blocks.*.ffn.down": Experts("model.layers.*.mlp.experts.#.down_proj.weight"),
    }
)
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
    mixer = shared.attention(c, qk_norm={"norm": norm}, bias="all" if c.flag("attention_bias", False) else "none")
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
