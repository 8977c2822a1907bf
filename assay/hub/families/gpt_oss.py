"""gpt-oss: sinks, windows in every other layer, experts with biases and a clamped SwiGLU. arXiv 2508.10925."""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Packed
from assay.spec.model import ModelSpec

TYPES = ("gpt_oss",)
NAMES = shared.over(
    {
        "blocks.*.mixer.sink": "model.layers.*.self_attn.sinks",
        "blocks.*.ffn.router.map.*": "model.layers.*.mlp.router.*",
        "blocks.*.ffn.{gate,up}": Packed("model.layers.*.mlp.experts.gate_up_proj", columns="turns"),
        "blocks.*.ffn.{gate_bias,up_bias}": Packed("model.layers.*.mlp.experts.gate_up_proj_bias", columns="turns"),
        "blocks.*.ffn.down": Packed("model.layers.*.mlp.experts.down_proj"),
        "blocks.*.ffn.down_bias": "model.layers.*.mlp.experts.down_proj_bias",
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    layers = c.integer("num_hidden_layers")
    kinds = c.each_layer("layer_types", layers, lambda i: shared.FULL if i % 2 else shared.SLIDING)
    c.must_be("hidden_act", "silu")
    router = {"kind": "topk", "k": c.integer(c.either("num_experts_per_tok", "experts_per_token")), "bias": True}
    router["balance"] = c.number("router_aux_loss_coef", 0.0)
    moe = {
        "kind": "moe",
        "experts": c.integer(c.either("num_local_experts", "num_experts")),
        "width": c.integer("intermediate_size"),
        "bias": True,
        "clamp": {"limit": c.number("swiglu_limit", 7.0), "alpha": c.number("swiglu_alpha", 1.702)},
        "router": router,
    }
    bias, norm = (
        shared.biases(c, True),
        shared.rmsnorm(c, eps=c.number("rms_norm_eps", 1e-5)),
    )
    c.ignore("experts_per_token", "num_experts", "initial_context_length", "sliding_window")

    def block(sees: Tree) -> Tree:
        mixer = shared.attention(c, sees=sees, bias=bias, scores={"sink": True})
        return {"mixer": mixer, "ffn": moe, "norm": {"kind": norm}}

    made = {shared.FULL: lambda: block({}), shared.SLIDING: lambda: block(shared.window(c))}
    blocks, pattern = shared.by_kind(c, kinds, made)
    return shared.decoder(c, blocks, pattern, final_norm=norm, positions={"main": c.rope(theta=150_000.0)})


def hugging_face(spec: ModelSpec) -> Tree:
    moe, width = outward.part(spec, "ffn", "moe"), outward.window(spec)
    router = outward.of_kind(moe.router, "blocks.0.ffn.router", "topk")
    if moe.clamp is None:
        raise ValueError("blocks.0.ffn.clamp: null; a limit and an alpha are expected")
    return {
        **outward.decoder(spec, "gpt_oss", "GptOssForCausalLM", ffn="moe"),
        **outward.rope(spec),
        "attention_bias": outward.biased(spec),
        "layer_types": outward.layer_types(spec),
        "sliding_window": width,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": router.balance,
        "swiglu_limit": moe.clamp.limit,
        "swiglu_alpha": moe.clamp.alpha,
    }
