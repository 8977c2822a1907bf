"""BERT: bidirectional, learned positions, segments, a norm after each sum. Devlin et al. 2018, arXiv 1810.04805."""

from __future__ import annotations

from typing import Any

from assay.hub import outward
from assay.hub.config import Config, Tree
from assay.hub.family import Names
from assay.spec.model import ModelSpec

TYPES = ("bert",)
BODY: Names = {
    "embed.weight": "embeddings.word_embeddings.weight",
    "embed.types": "embeddings.token_type_embeddings.weight",
    "positions.main.norm.*": "embeddings.LayerNorm.*",
    "positions.main.weight": "embeddings.position_embeddings.weight",
    "blocks.*.mixer.q.*": "encoder.layer.*.attention.self.query.*",
    "blocks.*.mixer.k.*": "encoder.layer.*.attention.self.key.*",
    "blocks.*.mixer.v.*": "encoder.layer.*.attention.self.value.*",
    "blocks.*.mixer.out.*": "encoder.layer.*.attention.output.dense.*",
    "blocks.*.residual0.norm.*": "encoder.layer.*.attention.output.LayerNorm.*",
    "blocks.*.ffn.up.*": "encoder.layer.*.intermediate.dense.*",
    "blocks.*.ffn.down.*": "encoder.layer.*.output.dense.*",
    "blocks.*.residual1.norm.*": "encoder.layer.*.output.LayerNorm.*",
}
MASKED: Names = {
    "head.dense.*": "cls.predictions.transform.dense.*",
    "head.norm.*": "cls.predictions.transform.LayerNorm.*",
    "head.out.weight": "cls.predictions.decoder.weight",
    "head.out.bias": "cls.predictions.bias",
    "head.bias": "cls.predictions.bias",
}
POOLED: Names = {"head.dense.*": "bert.pooler.dense.*"}
CLASSIFY: Names = {**POOLED, "head.out.*": "classifier.*"}
SAME = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
OLDER = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # TensorFlow's names, of 2018
OTHERWISE = (("bert.", ""), *OLDER)
POOLER = "BERT's pooled output, which this head does not read"
TANH: Tree = {"kind": "pooled", "pool": "first", "normalise": False, "act": "tanh"}


def names(spec: ModelSpec) -> Names:
    head = {"classify": CLASSIFY, "pooled": POOLED}.get(kind_of(spec), MASKED)
    return {**{ours: f"bert.{theirs}" for ours, theirs in BODY.items()}, **head}


def kind_of(spec: ModelSpec) -> str:
    return "none" if spec.head is None else spec.head.kind_name()


def skip(spec: ModelSpec) -> dict[str, str]:
    found = {
        "bert.embeddings.position_ids": "0, 1, 2, ...",
        "embeddings.position_ids": "0, 1, 2, ...",
        "cls.seq_relationship.*": "next-sentence prediction, a task of the pre-training",
    }
    if kind_of(spec) not in ("classify", "pooled"):
        found |= dict.fromkeys(("bert.pooler.dense.*", "pooler.dense.*"), POOLER)
    return found


def spec(c: Config) -> Tree:
    d, norm, act = c.integer("hidden_size"), layernorm(c), c.activation("hidden_act", "gelu")
    masked = {"kind": "mlm", "act": act, "norm": norm, "tie": c.flag("tie_word_embeddings", True)}
    heads = {"mlm": masked, "classify": {"kind": "classify", "labels": labels(c)}, "pooled": TANH, "none": None}
    found = purpose(c, "cls.predictions.bias", "classifier.weight")
    return {
        **body(c, c.integer("max_position_embeddings")),
        "d_model": d,
        "head": heads[pools(c, "bert") if found == "none" else found],
    }


def layernorm(c: Config) -> Tree:
    return {"kind": "layernorm", "eps": c.number("layer_norm_eps", 1e-12)}


def body(c: Config, context: int) -> Tree:
    """Everything but the head, as RoBERTa has it too."""
    norm, heads = layernorm(c), c.integer("num_attention_heads")
    c.must_be("is_decoder", False, why="a decoder's mask is causal")
    c.must_be("add_cross_attention", False)
    c.must_be("position_embedding_type", "absolute")
    c.ignore("attention_probs_dropout_prob", "hidden_dropout_prob", "directionality", "finetuning_task", "num_labels")
    c.ignore(*(f"pooler_{x}" for x in ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")))
    mixer = {"kind": "gqa", "heads": heads, "bias": "all", "sees": {"causal": False}}
    act = c.activation("hidden_act", "gelu")
    ffn = {"kind": "dense", "width": c.integer("intermediate_size"), "act": act, "bias": True}
    return {
        "vocab": c.integer("vocab_size"),
        "layers": c.integer("num_hidden_layers"),
        "context": context,
        "positions": {"main": {"kind": "learned", "norm": norm}},
        "embed": {"kind": "token", "types": c.integer("type_vocab_size", 2)},
        "blocks": {"block": {"mixer": mixer, "ffn": ffn, "norm": {"place": "post", "kind": norm}}},
        "final_norm": None,
    }


def labels(c: Config) -> int:
    """How many classes a classifier tells apart: transformers keeps their names, and two are its default."""
    return len(c.mapping("id2label", {0: "", 1: ""}))


def purpose(c: Config, masked: str, classifier: str) -> str:
    """mlm, classify or none: which head the tensors `masked` and `classifier` show, or, where a configuration stands
    alone, the class that it names."""
    names = c.listed("architectures", None) or [""]
    task = str(names[0]).rpartition("For")[2]
    if c.tensors is None:
        return {"MaskedLM": "mlm", "PreTraining": "mlm", "SequenceClassification": "classify"}.get(task, "none")
    if masked in c.tensors:
        return "mlm"
    if classifier not in c.tensors:
        return "none"
    if task != "SequenceClassification":
        raise ValueError(
            f"{c.where}: architectures: {names[0]!r:.80}; accepted with a classifier: ...ForSequenceClassification"
        )
    return "classify"


def pools(c: Config, prefix: str) -> str:
    """pooled or none, for a model without another head: as the tensors show, or, where a configuration stands alone, as
    the class it names has a pooler, unless it says otherwise (in a key of ours, which transformers passes over)."""
    wanted = c.flag("add_pooling_layer", True) and str((c.listed("architectures", None) or [""])[0]).endswith("Model")
    shown = (f"{name}pooler.dense.weight" in c.tensors for name in ("", f"{prefix}.")) if c.tensors is not None else ()
    return "pooled" if any(shown) or (c.tensors is None and wanted) else "none"


def hugging_face(spec: ModelSpec) -> Tree:
    return {**body_outward(spec, "bert", "Bert"), "max_position_embeddings": spec.context}


def body_outward(spec: ModelSpec, model_type: str, name: str) -> Tree:
    """The keys of `body`, and the class that has this head."""
    mixer, net, embed = outward.part(spec, "mixer", "gqa"), outward.part(spec, "ffn", "dense"), spec.embed
    return {
        "model_type": model_type,
        "hidden_size": spec.d_model,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": mixer.heads,
        "intermediate_size": net.width,
        "hidden_act": outward.activation(net),
        "layer_norm_eps": outward.learned(spec).norm.eps,
        "type_vocab_size": max(1, outward.of_kind(embed, "embed", "token").types),
        **head_outward(spec, name),
        **({"add_pooling_layer": False} if spec.head is None else {}),
    }


def head_outward(spec: ModelSpec, name: str) -> Tree:
    """The class of transformers with this head, and what a configuration says of it."""
    if kind_of(spec) in ("none", "pooled"):
        return {"architectures": [f"{name}Model"]}
    head: Any = spec.head
    if kind_of(spec) == "classify":
        classes = {str(i): f"LABEL_{i}" for i in range(head.labels)}
        known = {"id2label": classes, "label2id": {label: int(i) for i, label in classes.items()}}
        return {"architectures": [f"{name}ForSequenceClassification"], **known}
    tied = outward.of_kind(head, "head", "mlm").tie
    return {"architectures": [f"{name}ForMaskedLM"], "tie_word_embeddings": tied}
