"""Mamba-2: state spaces with one number a head, and no other layer. Dao and Gu 2024, arXiv 2405.21060."""

from __future__ import annotations

import math
from typing import Any

from assay.hub import outward
from assay.hub.config import Config, Tree, is_number
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Fused
from assay.spec.model import ModelSpec

TYPES = ("mamba2",)
SAME = {"lm_head.weight": "backbone.embeddings.weight"}
CONTEXT = 2048  # what the published ones were trained on; nothing ends there, and configurations name no length
NAMES: Names = {
    "embed.weight": "backbone.embeddings.weight",
    "blocks.*.mixer_norm.*": "backbone.layers.*.norm.*",
    "blocks.*.mixer.{z,x,b,c,dt}.*": Fused("backbone.layers.*.mixer.in_proj.*"),
    "blocks.*.mixer.conv": Depthwise("backbone.layers.*.mixer.conv1d.weight"),
    "blocks.*.mixer.conv_bias": "backbone.layers.*.mixer.conv1d.bias",
    "blocks.*.mixer.A_log": "backbone.layers.*.mixer.A_log",
    "blocks.*.mixer.D": "backbone.layers.*.mixer.D",
    "blocks.*.mixer.dt_bias": "backbone.layers.*.mixer.dt_bias",
    "blocks.*.mixer.norm": "backbone.layers.*.mixer.norm.weight",
    "blocks.*.mixer.out.*": "backbone.layers.*.mixer.out_proj.*",
    "final_norm.*": "backbone.norm_f.*",
    "head.out.*": "lm_head.*",
}


def spec(c: Config) -> Tree:
    d, heads, size = c.integer("hidden_size"), c.integer("num_heads"), c.integer("head_dim")
    if heads * size != c.integer("expand", 2) * d:
        raise ValueError(f"{c.where}: num_heads: {heads}; expand * hidden_size / head_dim is expected")
    c.must_be("hidden_act", "silu", "swish")
    c.must_be("norm_before_gate", False)
    c.must_be("rms_norm", True)
    c.ignore("chunk_size", "time_step_rank", "time_step_floor", "rescale_prenorm_residual", "residual_in_fp32")
    norm = {"kind": "rmsnorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    mixer = {
        "kind": "mamba2",
        "heads": heads,
        "head_dim": size,
        "state_size": c.integer("state_size"),
        "groups": c.integer("n_groups", 8),
        "conv": c.integer("conv_kernel", 4),
        "conv_bias": c.flag("use_conv_bias", True),
        "bias": c.flag("use_bias", False),
        "dt": steps(c),
        "norm": {"eps": norm["eps"]},
    }
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": c.integer("num_hidden_layers"),
        "context": c.integer("max_position_embeddings", CONTEXT),
        "blocks": {"block": {"mixer": mixer, "norm": {"kind": norm}}},
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", False)},
    }


def steps(c: Config) -> Tree:
    """Where time steps begin, and what bounds them; infinity does not."""
    least, most = limits = c.listed("time_step_limit", [0.0, math.inf], 2)
    if not is_number(least) or not (most == math.inf or is_number(most)):
        raise ValueError(
            f"{c.where}: time_step_limit: {limits!r:.80}; two numbers are expected, the second may be infinite"
        )
    bounds: Tree = {"at_least": least, "at_most": None if most == math.inf else most}
    return {"low": c.positive("time_step_min", 1e-3), "high": c.positive("time_step_max", 0.1), **bounds}


def hugging_face(spec: ModelSpec) -> Tree:
    mixer: Any = outward.part(spec, "mixer", "mamba2")
    site, dt = spec.site(0), mixer.dt
    return {
        **outward.basics(spec, "mamba2", "Mamba2ForCausalLM"),
        "num_heads": mixer.count(site),
        "head_dim": mixer.head_dim,
        "expand": mixer.inner(site) // spec.d_model,
        "state_size": mixer.state_size,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "time_step_min": dt.low,
        "time_step_max": dt.high,
        "time_step_limit": [dt.at_least, math.inf if dt.at_most is None else dt.at_most],
        "layer_norm_epsilon": outward.epsilon(spec),
    }
