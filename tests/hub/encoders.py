"""Tiny, randomly drawn encoders and encoder-decoders of Hugging Face, and what transformers computes with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.model.hf import VOCAB, randomised

BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "layer_norm_eps": 2e-3,
    "hidden_act": "gelu_new",
    "num_labels": 3,
}
ROBERTA = {**BERT, "pad_token_id": 1, "type_vocab_size": 1, "hidden_act": "gelu"}
MODERN: dict[str, Any] = {
    **{k: v for k, v in BERT.items() if k not in ("layer_norm_eps", "hidden_act")},
    "num_hidden_layers": 4,
    "norm_eps": 2e-3,
    "local_attention": 6,
    "pad_token_id": 0,
    "classifier_bias": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 900.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
LOCAL = {**MODERN, "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "attention_bias": True}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "activation_function": "relu",
    "scale_embedding": True,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 2e-3,
    "decoder_start_token_id": 0,
}
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertConfig, hf.BertForMaskedLM, BERT),
    "bert-pretraining": (hf.BertConfig, hf.BertForPreTraining, BERT),
    "bert-base": (hf.BertConfig, hf.BertModel, BERT),
    "bert-classifier": (hf.BertConfig, hf.BertForSequenceClassification, BERT),
    "roberta": (hf.RobertaConfig, hf.RobertaForMaskedLM, ROBERTA),
    "roberta-classifier": (hf.RobertaConfig, hf.RobertaForSequenceClassification, ROBERTA),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaForMaskedLM, ROBERTA),
    "modernbert": (hf.ModernBertConfig, hf.ModernBertForMaskedLM, MODERN),
    "modernbert-local": (hf.ModernBertConfig, hf.ModernBertForMaskedLM, {**LOCAL, "decoder_bias": False}),
    "modernbert-classifier": (
        hf.ModernBertConfig,
        hf.ModernBertForSequenceClassification,
        {**MODERN, "classifier_pooling": "mean"},
    ),
    "bart": (hf.BartConfig, hf.BartForConditionalGeneration, BART),
    "t5": (hf.T5Config, hf.T5ForConditionalGeneration, T5),
    "t5-v1.1": (
        hf.T5Config,
        hf.T5ForConditionalGeneration,
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
OLDER = {"bert", "modernbert", "t5", "t5-v1.1"}
"""Those whose configuration reads differently on the hub."""
TWO_SIDED = ("bart", "t5", "t5-v1.1")


def save(name: str, folder: Path) -> Any:
    """The model, written by save_pretrained. T5 v1.1 has a head of its own, which transformers 5 unties on loading."""
    config, cls, values = MADE[name]
    model = randomised(cls(config(**values, attn_implementation="eager")), seed=5)
    if name == "t5-v1.1":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    model.save_pretrained(folder)
    return model


def older(folder: Path, name: str) -> Path:
    """config.json in the keys of files on the hub, beside it."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if name == "modernbert":
        rules: Mapping[str, Any] = found.pop("rope_parameters")
        found.pop("layer_types")
        found["global_attn_every_n_layers"] = 3
        found["global_rope_theta"] = rules["full_attention"]["rope_theta"]
        found["local_rope_theta"] = rules["sliding_attention"]["rope_theta"]
    if name.startswith("t5"):
        found["tie_word_embeddings"] = found.pop("scale_decoder_outputs")
    if name == "bert":
        found["position_embedding_type"] = "absolute"
    path = folder / "config.hub.json"
    path.write_text(json.dumps(found))
    return path


@torch.no_grad()
def outputs(model: Any, ids: Tensor, **more: Any) -> dict[str, Tensor]:
    """Hidden states, features and logits of one pass, by transformers' own means, under the names of our taps."""
    out = model(input_ids=ids, output_hidden_states=True, **more)
    if "decoder_input_ids" in more:
        sides = {"encoder.": out.encoder_hidden_states, "": out.decoder_hidden_states}
    else:
        sides = {"": out.hidden_states}
    found: dict[str, Tensor] = {}
    for prefix, (*hidden, final) in sides.items():
        found |= {f"{prefix}blocks.{i}.in": h.flatten(0, 1) for i, h in enumerate(hidden)}
        found[f"{prefix}final"] = final.flatten(0, 1)
    logits = next((out[key] for key in ("logits", "prediction_logits", "pooler_output") if key in out), None)
    return found | ({"logits": logits.reshape(-1, logits.shape[-1])} if logits is not None else {})
