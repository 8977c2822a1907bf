"""ModernBERT: pre-norm, RoPE, gated and mostly local, bidirectional. Warner et al. 2024, arXiv 2412.13663."""

from __future__ import annotations

from typing import Any

from assay.hub import outward, shared
from assay.hub.config import Config, Tree
from assay.hub.families import bert
from assay.hub.rules import Fused
from assay.spec.model import ModelSpec

TYPES = ("modernbert",)
NAMES = {
    "embed.weight": "model.embeddings.tok_embeddings.weight",
    "embed.norm.*": "model.embeddings.norm.*",
    "blocks.*.mixer_norm.*": "model.layers.*.attn_norm.*",
    "blocks.*.mixer.{q,k,v}.*": Fused("model.layers.*.attn.Wqkv.*"),
    "blocks.*.mixer.out.*": "model.layers.*.attn.Wo.*",
    "blocks.*.ffn_norm.*": "model.layers.*.mlp_norm.*",
    "blocks.*.ffn.{gate,up}.*": Fused("model.layers.*.mlp.Wi.*"),
    "blocks.*.ffn.down.*": "model.layers.*.mlp.Wo.*",
    "final_norm.*": "model.final_norm.*",
    "head.dense.*": "head.dense.*",
    "head.norm.*": "head.norm.*",
    "head.bias": "decoder.bias",
    "head.out.*": "classifier.*",
}
SAME = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
OTHERWISE = (("model.", ""),)
EVERY = 3  # of three layers the first sees everything
THETA = {shared.FULL: 160_000.0, shared.SLIDING: 10_000.0}
POOLS = {"cls": "first", "mean": "mean"}


def spec(c: Config) -> Tree:
    layers, every = c.integer("num_hidden_layers"), c.integer("global_attn_every_n_layers", EVERY)
    kinds = c.each_layer("layer_types", layers, lambda i: shared.SLIDING if i % every else shared.FULL)
    norm = {"kind": "layernorm", "eps": c.number("norm_eps", 1e-5), "bias": c.flag("norm_bias", False)}
    c.ignore("attention_dropout", "embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "cls_token_id")
    c.ignore(
        "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "reference_compile", "pad_token_id"
    )
    c.ignore("repad_logits_with_grad", "layer_norm_eps", "position_embedding_type")
    made = {kind: block(c, kind, norm) for kind in dict.fromkeys(kinds)}
    first = {"stages": [stage({**b, "pre": None}) if i == 0 else stage(b) for i, b in enumerate(made[kinds[0]])]}
    blocks = {short(kind): {"stages": [stage(branch) for branch in branches]} for kind, branches in made.items()}
    return {
        "d_model": c.integer("hidden_size"),
        "vocab": c.integer("vocab_size"),
        "layers": layers,
        "context": c.integer("max_position_embeddings", 8192),
        "positions": {short(kind): rope(c, kind) for kind in dict.fromkeys(kinds)},
        "embed": {"kind": "token", "norm": norm},
        "blocks": {"first": first, **{name: made for name, made in blocks.items() if name in map(short, kinds[1:])}},
        "pattern": ("first", *(short(kind) for kind in kinds[1:])),
        "final_norm": norm,
        "head": head(c, norm),
    }


def short(kind: str) -> str:
    return kind.removesuffix("_attention")


def rope(c: Config, kind: str) -> Tree:
    """One table for each kind of layer; files on the hub name two numbers."""
    older = {shared.FULL: "global_rope_theta", shared.SLIDING: "local_rope_theta"}
    return c.rope(kind, c.number(older[kind], THETA[kind]))


def block(c: Config, kind: str, norm: Tree) -> list[Tree]:
    """The two branches of a layer. A local one sees half of `local_attention` on either side."""
    if kind not in THETA:
        raise ValueError(f"{c.where}: layer_types: {kind!r}; accepted: {', '.join(THETA)}")
    side = c.integer("local_attention", 128) // 2
    mixer = {
        "kind": "gqa",
        "heads": c.integer("num_attention_heads"),
        "position": short(kind),
        "sees": {"causal": False} if kind == shared.FULL else {"causal": False, "band": [side, side]},
        "bias": shared.biases(c),
    }
    ffn = {"kind": "gated", "width": c.integer("intermediate_size"), "bias": c.flag("mlp_bias", False)}
    ffn["act"] = c.activation("hidden_activation", "gelu")
    return [{"mixer": mixer, "pre": norm}, {"ffn": ffn, "pre": norm}]


def stage(branch: Tree) -> Tree:
    return {"branches": [branch]}


def head(c: Config, norm: Tree) -> Tree | None:
    """The same dense map, activation and norm stand in front of the vocabulary and of a classifier."""
    c.must_be("tie_word_embeddings", True)
    act, bias = c.activation("classifier_activation", "gelu"), c.flag("classifier_bias", False)
    pool = POOLS[c.text("classifier_pooling", "cls", tuple(POOLS))]
    common = {"act": act, "dense_bias": bias, "norm": norm}
    heads = {
        "mlm": {"kind": "mlm", "bias": c.flag("decoder_bias", True), **common},
        "classify": {"kind": "classify", "labels": bert.labels(c), "pool": pool, **common},
        "none": None,
    }
    found = bert.purpose(c, "decoder.bias", "classifier.weight")
    if found == "none" and "head.dense.weight" in (c.tensors or ()):
        found = "mlm"  # its decoder has no bias, and its matrix is the embedding's
    return heads[found]


def hugging_face(spec: ModelSpec) -> Tree:
    outward.whole_heads(spec, by_width=True)
    mixers = [outward.part(spec, "mixer", "gqa", i) for i in range(spec.layers)]
    kinds = [shared.FULL if mixer.sees.band is None else shared.SLIDING for mixer in mixers]
    bands = [mixer.sees.band for mixer in mixers if mixer.sees.band is not None]
    net, head = outward.part(spec, "ffn", "gated"), bert.head_outward(spec, "ModernBert")
    ropes = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in THETA.items()}
    for kind in set(kinds):
        layer = kinds.index(kind)
        ropes[kind] = outward.rope_rules(spec, outward.position(spec, "rope", layer), outward.head_size(spec, layer))
    return {
        "model_type": "modernbert",
        "hidden_size": spec.d_model,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "max_position_embeddings": spec.context,
        "num_attention_heads": mixers[0].heads,
        "attention_bias": outward.biased(spec),
        "layer_types": kinds,
        "local_attention": 2 * bands[0][0] if bands else 128,
        "rope_parameters": ropes,
        "intermediate_size": net.width,
        "hidden_activation": outward.activation(net),
        "mlp_bias": net.bias,
        "norm_eps": outward.epsilon(spec, "layernorm"),
        "norm_bias": bool(getattr(spec.final_norm, "bias", False)),
        **head,
        **pooled(spec.head),
    }


def pooled(head: Any) -> Tree:
    """What stands in front of the vocabulary or of the classes."""
    if head is None:
        return {}
    if head.act not in outward.ACTS:
        raise ValueError(f"head.act: {head.act!r}; {', '.join(outward.ACTS)} are expected")
    found = {"classifier_activation": outward.ACTS[head.act], "classifier_bias": head.dense_bias}
    if head.kind_name() == "mlm":
        return found | {"decoder_bias": head.bias}
    if head.pool not in POOLS.values():
        raise ValueError(f"head.pool: {head.pool!r}; {', '.join(POOLS.values())} are expected")
    return found | {"classifier_pooling": next(name for name, pool in POOLS.items() if pool == head.pool)}
