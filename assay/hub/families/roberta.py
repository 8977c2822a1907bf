"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions begin after the padding's. Liu et al. 2019, 1907.11692."""

from __future__ import annotations

from assay.hub.config import Config, Tree
from assay.hub.families import bert
from assay.hub.family import Names
from assay.hub.rules import Tail
from assay.spec.model import ModelSpec

TYPES = ("roberta", "xlm-roberta", "camembert")
FIRST = 2  # the padding's id, always 1, plus one: rows of the table before it belong to no token
MASKED: Names = {
    "head.dense.*": "lm_head.dense.*",
    "head.norm.*": "lm_head.layer_norm.*",
    "head.out.weight": "lm_head.decoder.weight",
    "head.out.bias": "lm_head.bias",
    "head.bias": "lm_head.bias",
}
CLASSIFY: Names = {"head.dense.*": "classifier.dense.*", "head.out.*": "classifier.out_proj.*"}
POOLED: Names = {"head.dense.*": "roberta.pooler.dense.*"}
PLACES = dict.fromkeys(("roberta.embeddings.position_ids", "embeddings.position_ids"), "0, 1, 2, ...")
SAME = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
OTHERWISE = (("roberta.", ""), *bert.OLDER)


def names(spec: ModelSpec) -> Names:
    head = {"classify": CLASSIFY, "pooled": POOLED}.get(bert.kind_of(spec), MASKED)
    own = {"positions.main.weight": Tail("roberta.embeddings.position_embeddings.weight", FIRST)}
    return {**{ours: f"roberta.{theirs}" for ours, theirs in bert.BODY.items()}, **own, **head}


def skip(spec: ModelSpec) -> dict[str, str]:
    pooler = dict.fromkeys(("roberta.pooler.dense.*", "pooler.dense.*"), bert.POOLER)
    return PLACES | ({} if bert.kind_of(spec) == "pooled" else pooler)


def spec(c: Config) -> Tree:
    d, norm = c.integer("hidden_size"), bert.layernorm(c)
    c.must_be("pad_token_id", FIRST - 1, why="positions begin after it")
    masked = {"kind": "mlm", "norm": norm, "tie": c.flag("tie_word_embeddings", True)}
    classify = {"kind": "classify", "labels": bert.labels(c)}
    heads = {"mlm": masked, "classify": classify, "pooled": bert.TANH, "none": None}
    found = bert.purpose(c, "lm_head.bias", "classifier.out_proj.weight")
    if "classifier.weight" in (c.tensors or ()):
        raise ValueError(
            f"{c.where}: a classifier of single tokens; accepted: ...ForMaskedLM, ...ForSequenceClassification"
        )
    return {
        **bert.body(c, c.integer("max_position_embeddings", least=FIRST + 1) - FIRST),
        "d_model": d,
        "head": heads[bert.pools(c, "roberta") if found == "none" else found],
    }


def hugging_face(spec: ModelSpec) -> Tree:
    """`pad_token_id` is where positions begin, whatever the tokenizer fills with."""
    found = bert.body_outward(spec, "roberta", "Roberta")
    return {**found, "max_position_embeddings": spec.context + FIRST, "pad_token_id": FIRST - 1}
