"""Mamba and Falcon Mamba: one selective state-space mixer a layer and nothing else. arXiv 2312.00752, 2410.05355."""

from __future__ import annotations

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Depthwise, Fused
from assay.spec.model import ModelSpec

TYPES = ("mamba", "falcon_mamba")
SAME = {"lm_head.weight": "backbone.embeddings.weight"}
OTHERWISE = (("backbone.embeddings.", "backbone.embedding."),)
CONTEXT = 2048  # what Mamba was trained on; a recurrence sets no end, and its configurations name none
MIXER = "backbone.layers.*.mixer"
NAMES: Names = {
    "embed.weight": "backbone.embeddings.weight",
    "blocks.*.mixer_norm.*": "backbone.layers.*.norm.*",
    "blocks.*.mixer.{x,z}.*": Fused(f"{MIXER}.in_proj.*"),
    "blocks.*.mixer.conv": Depthwise(f"{MIXER}.conv1d.weight"),
    "blocks.*.mixer.conv_bias": f"{MIXER}.conv1d.bias",
    "blocks.*.mixer.select.*": f"{MIXER}.x_proj.*",
    "blocks.*.mixer.dt_weight": f"{MIXER}.dt_proj.weight",
    "blocks.*.mixer.dt_bias": f"{MIXER}.dt_proj.bias",
    "blocks.*.mixer.a_log": f"{MIXER}.A_log",
    "blocks.*.mixer.d": f"{MIXER}.D",
    "blocks.*.mixer.out.*": f"{MIXER}.out_proj.*",
    "final_norm.*": "backbone.norm_f.*",
    "head.out.*": "lm_head.*",
}


def spec(c: Config) -> Tree:
    d, layers = c.integer("hidden_size"), c.integer("num_hidden_layers")
    norm = {"kind": "rmsnorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    c.must_be("rms_norm", True)
    c.ignore("time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor")
    c.ignore("rescale_prenorm_residual", "residual_in_fp32", "fused_add_norm", "use_mambapy", "use_associative_scan")
    c.ignore("use_falcon_mambapy", "d_model", "d_inner", "n_layer", "ssm_cfg", "pad_vocab_size_multiple")
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer("max_position_embeddings", CONTEXT),
        "blocks": {"block": {"mixer": mixer(c, d), "norm": {"kind": norm}}},
        "final_norm": norm,
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", True)},
    }


def mixer(c: Config, d: int) -> Tree:
    auto = c.values.get("time_step_rank", "auto") == "auto"
    c.ignore("time_step_rank") if auto else None
    found = {
        "kind": "mamba",
        "width": c.integer("intermediate_size", c.integer("expand", 2) * d),
        "state_dim": c.integer("state_size", 16),
        "dt_rank": -(-d // 16) if auto else c.integer("time_step_rank"),
        "conv": c.integer("conv_kernel", 4, least=2),
        "conv_bias": c.flag("use_conv_bias", True),
        "bias": c.flag("use_bias", False),
        "act": c.activation("hidden_act", "silu"),
    }
    c.ignore("expand")
    if c.text("model_type") == "falcon_mamba":
        found["norm"] = {"kind": "rmsnorm", "weight": "none", "eps": c.number("mixer_rms_eps", 1e-6)}
    return found


def hugging_face(spec: ModelSpec) -> Tree:
    """With norms inside its mixers it is a Falcon Mamba."""
    mixer = outward.part(spec, "mixer", "mamba")
    width, falcon = mixer.channels(spec.site(0)), mixer.norm is not None
    if width % spec.d_model:
        raise ValueError(f"blocks.0.mixer.width: {width}; a multiple of d_model ({spec.d_model}) is expected")
    named = ("falcon_mamba", "FalconMambaForCausalLM") if falcon else ("mamba", "MambaForCausalLM")
    return {
        **outward.basics(spec, *named),
        "expand": width // spec.d_model,
        "state_size": mixer.state_dim,
        "time_step_rank": mixer.rank(spec.site(0)),
        "conv_kernel": mixer.conv,
        "use_conv_bias": mixer.conv_bias,
        "use_bias": mixer.bias,
        "hidden_act": outward.activation(mixer),
        "layer_norm_epsilon": outward.epsilon(spec),
        **({"mixer_rms_eps": outward.of_kind(mixer.norm, "blocks.0.mixer.norm", "rmsnorm").eps} if falcon else {}),
    }
