"""T5 and T5 v1.1: relative positions by bucket, scores without a scale. Raffel et al. 2019, arXiv 1910.10683.

v1.1 gates its feed-forward network with GELU, and has a head of its own without T5's factor of d_model^-0.5.
"""

from __future__ import annotations

from typing import Any

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.spec.model import ModelSpec

TYPES = ("t5",)


def side(name: str, ours: str = "") -> Names:
    """The names of one of the two stacks; every layer reads the buckets of the first."""
    theirs, last = f"{name}.block.*.layer", 2 if name == "decoder" else 1
    attention = {
        f"{ours}blocks.*.{mine}.{x}.*": f"{theirs}.{i}.{other}.{y}.*"
        for i, (mine, other) in enumerate((("mixer", "SelfAttention"), ("mixer2", "EncDecAttention")))
        for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
    }
    return {
        f"{ours}positions.main.weight": f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        **attention,
        f"{ours}blocks.*.mixer_norm.*": f"{theirs}.0.layer_norm.*",
        f"{ours}blocks.*.mixer2_norm.*": f"{theirs}.1.layer_norm.*",
        f"{ours}blocks.*.ffn_norm.*": f"{theirs}.{last}.layer_norm.*",
        f"{ours}blocks.*.ffn.gate.*": f"{theirs}.{last}.DenseReluDense.wi_0.*",
        f"{ours}blocks.*.ffn.down.*": f"{theirs}.{last}.DenseReluDense.wo.*",
        f"{ours}final_norm.*": f"{name}.final_layer_norm.*",
    }


HEAD: Names = {"embed.weight": "shared.weight", "head.out.weight": "lm_head.weight"}
BOTH: Names = {**HEAD, **side("decoder"), **side("encoder", "encoder.")}
SKIP = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "cross-attention has no positions"}
SAME = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
OTHERWISE = (("shared.", "encoder.embed_tokens."),)
CONTEXT = 512  # what it was trained on; buckets set no end, and transformers' configurations name none


def names(spec: ModelSpec) -> Names:
    """One matrix goes up without a gate (`wi`), two with one."""
    gated = any(b.branches[0].part.kind_name() == "gated" for b in spec.expand()[0])
    up = {
        f"{ours}blocks.*.ffn.up.*": f"{name}.block.*.layer.{last}.DenseReluDense.{'wi_1' if gated else 'wi'}.*"
        for name, ours, last in (("decoder", "", 2), ("encoder", "encoder.", 1))
    }
    return {**BOTH, **up}


def spec(c: Config) -> Tree:
    d, layers = c.integer("d_model"), c.integer("num_layers")
    c.must_be("is_encoder_decoder", True)
    c.ignore("dropout_rate", "dense_act_fn", "is_gated_act", "decoder_start_token_id", "num_labels")
    # transformers 5 says of every T5 that it is tied, and writes down whether the output is scaled; the files on the
    # hub tie T5 and not v1.1. A head in the files is the model's own, whatever else is said.
    scaled = c.flag("scale_decoder_outputs", c.flag("tie_word_embeddings", True))
    own = "lm_head.weight" in c.tensors if c.tensors is not None else not scaled
    common = {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "context": c.integer("n_positions", CONTEXT),
        "final_norm": {"kind": "rmsnorm", "eps": c.number("layer_norm_epsilon", 1e-6)},
    }
    return {
        **common,
        **stack(c, c.integer("num_decoder_layers", layers), causal=True),
        "head": {"kind": "lm", "tie": not own, "scale": d**-0.5 if scaled else 1.0},
        "encoder": {
            **common,
            **stack(c, layers, causal=False),
            "embed": {"kind": "token", "shared": True},
            "head": None,
        },
    }


def stack(c: Config, layers: int, causal: bool) -> Tree:
    """Self-attention, for the decoder cross-attention, and the feed-forward network, each after a norm."""
    norm = {"kind": "rmsnorm", "eps": c.number("layer_norm_epsilon", 1e-6)}
    heads = {"heads": c.integer("num_heads"), "head_dim": c.integer("d_kv", 64)}
    buckets = {
        "buckets": c.integer("relative_attention_num_buckets", 32),
        "max_distance": c.integer("relative_attention_max_distance", 128),
    }
    sees, scores = {"causal": causal}, {"scale": 1.0}
    parts: list[Tree] = [{"mixer": {"kind": "gqa", **heads, "position": "main", "sees": sees, "scores": scores}}]
    parts += [{"mixer": {"kind": "cross", **heads, "scale": 1.0}}] if causal else []
    parts += [{"ffn": feed_forward(c)}]
    return {
        "layers": layers,
        "positions": {"main": {"kind": "t5", "heads": heads["heads"], "bidirectional": not causal, **buckets}},
        "blocks": {"block": {"stages": [{"branches": [{**part, "pre": norm}]} for part in parts]}},
    }


ACTS = {
    "relu": ("dense", "relu"),
    "gelu": ("dense", "gelu"),
    "gated-gelu": ("gated", "gelu_tanh"),
    "gated-silu": ("gated", "silu"),
    "gated-relu": ("gated", "relu"),
}


def feed_forward(c: Config) -> Tree:
    kind, act = ACTS[c.text("feed_forward_proj", "relu", tuple(ACTS))]
    return {"kind": kind, "width": c.integer("d_ff"), "act": act}


def hugging_face(spec: ModelSpec) -> Tree:
    """`tie_word_embeddings` says for transformers whether the output is scaled; its T5 ties a head that no file has."""
    if spec.encoder is None:
        raise ValueError("encoder: null; one is expected")
    mixer, table = outward.part(spec, "mixer", "gqa"), outward.position(spec, "t5")
    kind, net = projection(outward.at(spec, "ffn", 0)), outward.at(spec, "ffn", 0)
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": spec.d_model,
        "d_kv": outward.head_size(spec),
        "d_ff": net.width,
        "vocab_size": spec.vocab,
        "n_positions": spec.context,
        "num_layers": spec.encoder.layers,
        "num_decoder_layers": spec.layers,
        "num_heads": mixer.heads,
        "relative_attention_num_buckets": table.buckets,
        "relative_attention_max_distance": table.max_distance,
        "layer_norm_epsilon": outward.epsilon(spec),
        "feed_forward_proj": kind,
        "tie_word_embeddings": outward.of_kind(spec.head, "head", "lm").tie,
    }


def projection(net: Any) -> str:
    """T5's name of a feed-forward network."""
    found = next(
        (name for name, known in ACTS.items() if net is not None and known == (net.kind_name(), net.act)), None
    )
    if found is None:
        raise ValueError(f"blocks.0.ffn: {', '.join(f'{kind} with {act}' for kind, act in ACTS.values())} are expected")
    return found
