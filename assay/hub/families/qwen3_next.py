"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, many small experts and a gated shared one.

Qwen team 2025; the recurrence is that of arXiv 2412.06464, the gate on attention that of 2505.06708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Fused, FusedHeads, Place
from assay.spec.model import ModelSpec

TYPES = ("qwen3_next",)
LINEAR = "linear_attention"
SKIP = {**shared.SKIP, "mtp.**": "a layer that predicts a further token"}
SAME = shared.SAME


class KeyHeads(Fused):
    """Rows by head of the keys: its part of each matrix under the other, however many heads of values it serves."""

    def read(self, tensors: Sequence[Tensor], place: Place) -> list[Tensor]:
        part: Any = place.part
        grouped = tensors[0].unflatten(0, (part.key_heads, -1))
        return [m.flatten(0, 1) for m in grouped.split([rows // part.key_heads for rows in place.rows], 1)]

    def write(self, ours: Sequence[Tensor], place: Place) -> list[Tensor]:
        part: Any = place.part
        return [torch.cat([m.unflatten(0, (part.key_heads, -1)) for m in ours], 1).flatten(0, 1)]


def names(model: ModelSpec) -> Names:
    found: dict[str, Any] = {}
    for layer in range(model.layers):
        kinds = [b.part.kind_name() for _, _, b in model.branches(layer)]
        ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}"
        if "gqa" in kinds:
            found[f"{ours}.{{q,gate_map}}.*"] = FusedHeads(f"{theirs}.self_attn.q_proj.weight")
        else:
            found |= recurrent(ours, f"{theirs}.linear_attn")
    return shared.over({**found, **FFN})


def recurrent(ours: str, theirs: str) -> Names:
    return {
        f"{ours}.{{q,k,v,gate}}.weight": KeyHeads(f"{theirs}.in_proj_qkvz.weight"),
        f"{ours}.{{beta,decay}}.weight": KeyHeads(f"{theirs}.in_proj_ba.weight"),
        f"{ours}.{{q_conv,k_conv,v_conv}}": Depthwise(f"{theirs}.conv1d.weight"),
        f"{ours}.a_log": f"{theirs}.A_log",
        f"{ours}.dt_bias": f"{theirs}.dt_bias",
        f"{ours}.norm.weight": f"{theirs}.norm.weight",
        f"{ours}.out.weight": f"{theirs}.out_proj.weight",
    }


FFN: Names = {
    **shared.EXPERTS,
    "blocks.*.ffn.shared.share.*": "model.layers.*.mlp.shared_expert_gate.*",
    "blocks.*.ffn.shared.gate.*": "model.layers.*.mlp.shared_expert.gate_proj.*",
    "blocks.*.ffn.shared.up.*": "model.layers.*.mlp.shared_expert.up_proj.*",
    "blocks.*.ffn.shared.down.*": "model.layers.*.mlp.shared_expert.down_proj.*",
}


def spec(c: Config) -> Tree:
    layers, every = c.integer("num_hidden_layers"), c.integer("full_attention_interval", 4)
    attention = c.each_layer("layer_types", layers, lambda i: LINEAR if (i + 1) % every else shared.FULL)
    step, dense = c.integer("decoder_sparse_step", 1), c.listed("mlp_only_layers", [])
    norm = shared.rmsnorm(c, weight="plus_one")
    mixers = {LINEAR: delta(c), shared.FULL: attend(c, norm)}
    if unknown := sorted(set(attention) - mixers.keys()):
        raise ValueError(f"{c.where}: layer_types: {unknown[0]!r}; accepted: {', '.join(mixers)}")
    blocks, pattern = {}, []
    for i, kind in enumerate(attention):
        sparse = i not in dense and (i + 1) % step == 0
        name = f"{kind.removesuffix('_attention')}_{'moe' if sparse else 'mlp'}"
        blocks[name] = {"mixer": mixers[kind], "ffn": mixture(c) if sparse else shared.gated(c), "norm": {"kind": norm}}
        pattern.append(name)
    c.ignore("intermediate_size")
    rope = c.rope(share=0.25, size=c.integer("head_dim", 256))
    return shared.decoder(c, blocks, tuple(pattern), final_norm=norm, positions={"main": rope})


def attend(c: Config, norm: Tree) -> Tree:
    """Half of the rows of a head's queries are the logits of its gate."""
    c.must_be("attention_bias", False)
    return shared.attention(c, head_dim=c.integer("head_dim", 256), qk_norm={"norm": norm}, gate="element")


def delta(c: Config) -> Tree:
    c.must_be("hidden_act", "silu", why="that of the convolutions")
    return {
        "kind": "gated_deltanet",
        "heads": c.integer("linear_num_value_heads", 32),
        "k_heads": c.integer("linear_num_key_heads", 16),
        "head_dim": c.integer("linear_key_head_dim", 128),
        "value_dim": c.integer("linear_value_head_dim", 128),
        "conv": c.integer("linear_conv_kernel_dim", 4, least=2),
        "norm": shared.rmsnorm(c),
    }


def mixture(c: Config) -> Tree:
    act = c.activation("hidden_act")
    router = {"kind": "topk", "k": c.integer("num_experts_per_tok", 10), "renormalise": c.flag("norm_topk_prob", True)}
    router["balance"] = c.number("router_aux_loss_coef", 0.001)
    beside = {"kind": "gated", "width": c.integer("shared_expert_intermediate_size", 512), "act": act, "share": True}
    width = c.integer("moe_intermediate_size", 512)
    experts = c.integer("num_experts", 512)
    return {"kind": "moe", "experts": experts, "width": width, "act": act, "router": router, "shared": beside}


def hugging_face(spec: ModelSpec) -> Tree:
    mixer = outward.part(spec, "mixer", "gated_deltanet")
    kinds = [
        LINEAR if outward.kind_at(spec, "mixer", i) == "gated_deltanet" else shared.FULL for i in range(spec.layers)
    ]
    size = mixer.head_dim or spec.d_model // mixer.heads
    return {
        **outward.sizes(spec, "qwen3_next", "Qwen3NextForCausalLM"),
        **outward.grouped(spec),
        **outward.rope(spec, partial=True),
        **mixture_outward(spec),
        "rms_norm_eps": outward.epsilon(spec),
        "layer_types": kinds,
        "linear_num_key_heads": mixer.key_heads,
        "linear_num_value_heads": mixer.heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": mixer.value_dim or size,
        "linear_conv_kernel_dim": mixer.conv or 4,
    }


def mixture_outward(spec: ModelSpec) -> Tree:
    """The keys of `mixture`, and of the layers without experts."""
    plain = outward.kinds_at(spec, "ffn", "gated")
    net = outward.part(spec, "ffn", "gated" if plain else "moe")
    found = {"hidden_act": outward.activation(net), "mlp_only_layers": plain, "decoder_sparse_step": 1}
    found |= {"intermediate_size": net.width} if plain else {}
    if len(plain) == spec.layers:
        return found
    moe = outward.part(spec, "ffn", "moe")
    router = outward.of_kind(moe.router, "ffn.router", "topk")
    return {
        **found,
        "num_experts": moe.experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalise,
        "router_aux_loss_coef": router.balance,
        "moe_intermediate_size": moe.width,
        "shared_expert_intermediate_size": outward.of_kind(moe.shared, "ffn.shared", "gated").width,
    }
