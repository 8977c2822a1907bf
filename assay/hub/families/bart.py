"""BART: an encoder and a decoder with learned positions and a norm after each sum. Lewis et al. 2019, 1910.13461."""

from __future__ import annotations

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.hub.rules import Shaped, Tail
from assay.spec.model import ModelSpec

TYPES = ("bart",)
FIRST = 2  # rows of the position tables that no token reads


def side(name: str, ours: str = "") -> Names:
    """The names of one of the two stacks."""
    theirs = f"model.{name}"
    attention = {
        f"{ours}blocks.*.{mine}.{x}.*": f"{theirs}.layers.*.{other}.{y}.*"
        for mine, other in (("mixer", "self_attn"), ("mixer2", "encoder_attn"))
        for x, y in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj"))
    }
    norms = ["self_attn_layer_norm", "final_layer_norm"]
    norms.insert(1, "encoder_attn_layer_norm") if name == "decoder" else None
    return {
        f"{ours}positions.main.weight": Tail(f"{theirs}.embed_positions.weight", FIRST),
        f"{ours}positions.main.norm.*": f"{theirs}.layernorm_embedding.*",
        **attention,
        **{f"{ours}blocks.*.residual{i}.norm.*": f"{theirs}.layers.*.{norm}.*" for i, norm in enumerate(norms)},
        f"{ours}blocks.*.ffn.up.*": f"{theirs}.layers.*.fc1.*",
        f"{ours}blocks.*.ffn.down.*": f"{theirs}.layers.*.fc2.*",
    }


NAMES: Names = {
    "embed.weight": "model.shared.weight",
    "head.bias": Shaped("final_logits_bias", (1, -1)),
    **side("decoder"),
    **side("encoder", "encoder."),
}
SAME = dict.fromkeys(
    ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "model.shared.weight"
)
OTHERWISE = (("model.shared.", "model.encoder.embed_tokens."), ("model.", ""))
NORM = {"kind": "layernorm"}  # its eps is torch's default, whatever the configuration says
GENERATION = ("early_stopping", "length_penalty", "min_length", "no_repeat_ngram_size", "num_beams", "prefix")


def spec(c: Config) -> Tree:
    d, context = c.integer("d_model"), c.integer("max_position_embeddings", 1024)
    c.must_be("tie_word_embeddings", True)
    c.must_be("add_final_layer_norm", False)
    c.must_be("normalize_before", False)
    c.must_be("normalize_embedding", True)
    c.must_be("static_position_embeddings", False)
    c.must_be("scale_embedding", False, True)
    c.must_be("is_encoder_decoder", True)
    c.ignore(
        "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "classif_dropout", "init_std", "num_labels"
    )
    c.ignore("num_hidden_layers", "decoder_start_token_id", "extra_pos_embeddings", "add_bias_logits", *GENERATION)
    embed = {"kind": "token", "scale": d**0.5 if c.flag("scale_embedding", False) else 1.0}
    common = {
        "d_model": d,
        "vocab": c.integer("vocab_size"),
        "context": context,
        "positions": {"main": {"kind": "learned", "norm": NORM}},
        "final_norm": None,
    }
    encoder = {
        **common,
        "layers": c.integer("encoder_layers"),
        "blocks": {"block": block(c, "encoder")},
        "embed": {**embed, "shared": True},
        "head": None,
    }
    return {
        **common,
        "layers": c.integer("decoder_layers"),
        "blocks": {"block": block(c, "decoder")},
        "embed": embed,
        "head": {"kind": "lm", "tie": True, "bias": True},
        "encoder": encoder,
    }


def block(c: Config, name: str) -> Tree:
    heads, cross = c.integer(f"{name}_attention_heads"), name == "decoder"
    parts: list[Tree] = [{"mixer": {"kind": "gqa", "heads": heads, "bias": "all", "sees": {"causal": cross}}}]
    parts += [{"mixer": {"kind": "cross", "heads": heads, "bias": True}}] if cross else []
    act = c.activation("activation_function", "gelu")
    parts += [{"ffn": {"kind": "dense", "width": c.integer(f"{name}_ffn_dim"), "act": act, "bias": True}}]
    return {"stages": [{"branches": [part], "residual": {"kind": "post", "norm": NORM}} for part in parts]}


def hugging_face(spec: ModelSpec) -> Tree:
    if spec.encoder is None:
        raise ValueError("encoder: null; one is expected")
    scale = outward.of_kind(spec.embed, "embed", "token").scale
    found: Tree = {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": spec.d_model,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "scale_embedding": scale != 1.0,
        "activation_function": outward.activation(outward.part(spec, "ffn", "dense")),
        "tie_word_embeddings": outward.of_kind(spec.head, "head", "lm").tie,
    }
    for name, stack in (("encoder", spec.encoder), ("decoder", spec)):
        found[f"{name}_layers"] = stack.layers
        found[f"{name}_attention_heads"] = outward.part(stack, "mixer", "gqa").heads
        found[f"{name}_ffn_dim"] = outward.part(stack, "ffn", "dense").width
    return found
