"""Mixtral: two of eight experts a token. Jiang et al. 2024, arXiv 2401.04088."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Experts
from assay.spec.model import ModelSpec

TYPES = ("mixtral",)
NAMES = shared.over(
    {
        "blocks.*.ffn.router.map.weight": "model.layers.*.block_sparse_moe.gate.weight",
        "blocks.*.ffn.gate": Experts("model.layers.*.block_sparse_moe.experts.#.w1.weight"),
        "blocks.*.ffn.up": Experts("model.layers.*.block_sparse_moe.experts.#.w3.weight"),
        "blocks.*.ffn.down": Experts("model.layers.*.block_sparse_moe.experts.#.w2.weight"),
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    ffn = {
        "kind": "moe",
        "experts": c.integer("num_local_experts"),
        "width": c.integer("intermediate_size"),
        "act": c.activation("hidden_act"),
        "router": {
            "kind": "topk",
            "k": c.integer("num_experts_per_tok"),
            "balance": c.number("router_aux_loss_coef", 0.0),
        },
    }
    sees = shared.window_if_any(c)
    block = {"mixer": shared.attention(c, sees=sees), "ffn": ffn, "norm": {"kind": shared.rmsnorm(c)}}
    return shared.decoder(c, {"block": block}, positions={"main": c.rope()})


def hugging_face(spec: ModelSpec) -> Tree:
    moe = outward.part(spec, "ffn", "moe")
    return {
        **outward.decoder(spec, "mixtral", "MixtralForCausalLM", ffn="moe"),
        **outward.rope(spec),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": outward.of_kind(moe.router, "blocks.0.ffn.router", "topk").k,
        "router_aux_loss_coef": moe.router.balance,
        "sliding_window": outward.window(spec),
    }
