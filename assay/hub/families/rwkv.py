"""RWKV-4: time mixing and channel mixing, behind a LayerNorm. Peng et al. 2023, arXiv 2305.13048."""

from __future__ import annotations

from typing import Any

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.rules import Shaped
from assay.spec.model import ModelSpec

TYPES = ("rwkv",)
TIME, CHANNEL = "rwkv.blocks.*.attention", "rwkv.blocks.*.feed_forward"
NAMES = {
    "embed.weight": "rwkv.embeddings.weight",
    "blocks.0.residual0.norm.*": "rwkv.blocks.0.pre_ln.*",
    "blocks.*.mixer_norm.*": "rwkv.blocks.*.ln1.*",
    "blocks.*.mixer.mu_r": Shaped(f"{TIME}.time_mix_receptance", (1, 1, -1)),
    "blocks.*.mixer.mu_k": Shaped(f"{TIME}.time_mix_key", (1, 1, -1)),
    "blocks.*.mixer.mu_v": Shaped(f"{TIME}.time_mix_value", (1, 1, -1)),
    "blocks.*.mixer.decay": f"{TIME}.time_decay",
    "blocks.*.mixer.first": f"{TIME}.time_first",
    "blocks.*.mixer.r.*": f"{TIME}.receptance.*",
    "blocks.*.mixer.k.*": f"{TIME}.key.*",
    "blocks.*.mixer.v.*": f"{TIME}.value.*",
    "blocks.*.mixer.out.*": f"{TIME}.output.*",
    "blocks.*.ffn_norm.*": "rwkv.blocks.*.ln2.*",
    "blocks.*.ffn.mu_r": Shaped(f"{CHANNEL}.time_mix_receptance", (1, 1, -1)),
    "blocks.*.ffn.mu_k": Shaped(f"{CHANNEL}.time_mix_key", (1, 1, -1)),
    "blocks.*.ffn.r.*": f"{CHANNEL}.receptance.*",
    "blocks.*.ffn.k.*": f"{CHANNEL}.key.*",
    "blocks.*.ffn.v.*": f"{CHANNEL}.value.*",
    "final_norm.*": "rwkv.ln_out.*",
    "head.out.*": "head.*",
}
SAME = {"head.weight": "rwkv.embeddings.weight"}


def spec(c: Config) -> Tree:
    """`rescale_every` halves the stream against half precision's overflow, and the maps onto it with it: no norm after
    it sees a difference but for its epsilon."""
    d, layers = c.integer("hidden_size"), c.integer("num_hidden_layers")
    norm = {"kind": "layernorm", "eps": c.number("layer_norm_epsilon", 1e-5)}
    c.ignore("rescale_every")
    mixer = {"kind": "rwkv4", "width": c.integer("attention_hidden_size", d)}
    ffn = {"kind": "rwkv_channel", "width": c.integer("intermediate_size", 4 * d)}
    # The first layer normalises the embedding itself: what goes on is its norm.
    entry = {"branches": [{"mixer": mixer, "pre": norm}], "residual": {"kind": "normed", "norm": norm}}
    blocks: Tree = {"first": {"stages": [entry, {"branches": [{"ffn": ffn, "pre": norm}]}]}}
    if layers > 1:
        blocks["block"] = {"mixer": mixer, "ffn": ffn, "norm": {"kind": norm}}
    return {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer(c.either("context_length", "max_position_embeddings"), 1024),
        "blocks": blocks,
        "pattern": ("first", *["block"] * (layers - 1)),
        "final_norm": {"kind": "layernorm"},  # whatever the configuration says
        "head": {"kind": "lm", "tie": c.flag("tie_word_embeddings", False)},
    }


def hugging_face(spec: ModelSpec) -> Tree:
    """Nothing is rescaled: what is read back computes the same, and only the epsilons of norms would notice."""
    mixer, net = outward.part(spec, "mixer", "rwkv4"), outward.part(spec, "ffn", "rwkv_channel")
    norm: Any = spec.expand()[0][0].branches[0].pre
    found = outward.basics(spec, "rwkv", "RwkvForCausalLM")
    return {
        "context_length": found.pop("max_position_embeddings"),
        **found,
        "attention_hidden_size": mixer.width or spec.d_model,
        "intermediate_size": net.width,
        "layer_norm_epsilon": outward.of_kind(norm, "blocks.0.mixer_norm", "layernorm").eps,
        "rescale_every": 0,
    }
