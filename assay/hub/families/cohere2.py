"""Command R7B: both branches from one LayerNorm, three local layers with RoPE to a global one without positions.

Cohere 2024; Yang et al. 2025, arXiv 2501.18795.
"""

from __future__ import annotations

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.rules import Pairs
from assay.spec.model import ModelSpec

TYPES = ("cohere2",)
NAMES = shared.over(
    {
        "blocks.*.norm0.*": "model.layers.*.input_layernorm.*",
        "blocks.*.mixer.q.*": Pairs("model.layers.*.self_attn.q_proj.*"),
        "blocks.*.mixer.k.*": Pairs("model.layers.*.self_attn.k_proj.*"),
    }
)
SKIP, SAME = shared.SKIP, shared.SAME


def spec(c: Config) -> Tree:
    norm = {"kind": "layernorm", "eps": c.number("layer_norm_eps", 1e-5), "bias": False}
    kinds = shared.one_global_in(c, 4)
    bias = shared.biases(c)

    def block(**more: object) -> Tree:
        mixer = shared.attention(c, bias=bias, **more)
        return {"mixer": mixer, "ffn": shared.gated(c), "norm": {"kind": norm}, "parallel": "shared"}

    made = {shared.FULL: lambda: block(position=None), shared.SLIDING: lambda: block(sees=shared.window(c))}
    blocks, pattern = shared.by_kind(c, kinds, made)
    tree = shared.decoder(c, blocks, pattern, tie=True, final_norm=norm, positions={"main": c.rope()})
    tree["head"]["scale"] = c.number("logit_scale", 0.0625)
    return tree


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    kinds, net = outward.layer_types(spec), outward.part(spec, "ffn", "gated")
    turned = kinds.index(shared.SLIDING) if shared.SLIDING in kinds else 0
    return {
        **outward.sizes(spec, "cohere2", "Cohere2ForCausalLM"),
        **outward.rope(spec, turned),
        **outward.grouped(spec),
        "intermediate_size": net.width,
        "hidden_act": outward.activation(net),
        "layer_norm_eps": outward.epsilon(spec, "layernorm"),
        "attention_bias": outward.biased(spec),
        "logit_scale": outward.of_kind(spec.head, "head", "lm").scale,
        "layer_types": kinds,
        "sliding_window": outward.window(spec),
    }
