"""Tiny, randomly drawn Hugging Face checkpoints with fields far from their defaults, and what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from assay.hub.load import import_folder
from tests.model.hf import VOCAB, differences, randomised

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
USUAL: dict[str, Any] = {**SIZES, **HEADS, "rms_norm_eps": 2e-3, "pad_token_id": 0, "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"


def rope(theta: float = 500.0, **more: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **more}


LONG = rope(rope_type="longrope", short_factor=[1.0, 1.1], long_factor=[1.5, 3.0], partial_rotary_factor=0.5)
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 10}
GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 2.0}
GEMMA3 = {FULL: rope(900.0, rope_type="linear", factor=4.0), SLIDING: rope(100.0)}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        hf.LlamaConfig,
        hf.LlamaForCausalLM,
        {
            **USUAL,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": rope(**LLAMA3, original_max_position_embeddings=8),
        },
    ),
    "mistral": (
        hf.MistralConfig,
        hf.MistralForCausalLM,
        {**USUAL, "head_dim": 10, "sliding_window": 5, "rope_parameters": rope()},
    ),
    "qwen2": (
        hf.Qwen2Config,
        hf.Qwen2ForCausalLM,
        {**USUAL, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (
        hf.Qwen3Config,
        hf.Qwen3ForCausalLM,
        {**USUAL, "head_dim": 10, "tie_word_embeddings": True, "attention_bias": True, "rope_parameters": rope()},
    ),
    "gemma2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {**USUAL, **CAPS, "num_hidden_layers": 3, "head_dim": 10, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        hf.Gemma3TextConfig,
        hf.Gemma3ForCausalLM,
        {
            **USUAL,
            "num_hidden_layers": 4,
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "rope_parameters": GEMMA3,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": (
        hf.Phi3Config,
        hf.Phi3ForCausalLM,
        {**USUAL, "original_max_position_embeddings": 6, "rope_parameters": LONG, "sliding_window": 5},
    ),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, {**USUAL, "rope_parameters": rope()}),
    "granite": (hf.GraniteConfig, hf.GraniteForCausalLM, {**USUAL, **GRANITE, "tie_word_embeddings": True}),
    "cohere2": (
        hf.Cohere2Config,
        hf.Cohere2ForCausalLM,
        {
            **SIZES,
            **HEADS,
            "pad_token_id": 0,
            "num_hidden_layers": 4,
            "layer_norm_eps": 2e-3,
            "logit_scale": 0.5,
            "sliding_window": 5,
            "rope_parameters": rope(),
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "n_inner": 40,
            "n_positions": 64,
            "layer_norm_epsilon": 2e-3,
            "activation_function": "gelu",
        },
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig,
        hf.GPTNeoXForCausalLM,
        {
            **SIZES,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "layer_norm_eps": 2e-3,
            "rope_parameters": rope(partial_rotary_factor=0.5),
        },
    ),
    "bloom": (
        hf.BloomConfig,
        hf.BloomForCausalLM,
        {"vocab_size": VOCAB, "hidden_size": 24, "n_head": 6, "n_layer": 2, "layer_norm_epsilon": 2e-3},
    ),
    "mixtral": (
        hf.MixtralConfig,
        hf.MixtralForCausalLM,
        {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "rope_parameters": rope()},
    ),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        hf.Qwen3MoeForCausalLM,
        {**USUAL, **EXPERTS, "num_hidden_layers": 3, "head_dim": 10, "mlp_only_layers": [0], "rope_parameters": rope()},
    ),
}
PATTERN = {"gemma3_text": {"sliding_window_pattern": 3}, "cohere2": {"sliding_window_pattern": 4}}
"""The integers that stand for `layer_types` on the hub."""


def save(name: str, folder: Path) -> Any:
    """The family's model, written by save_pretrained."""
    config, model, values = FAMILIES[name]
    made = randomised(model(config(**values, attn_implementation="eager")), seed=3)
    made.save_pretrained(folder)
    return made


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 in the keys that files on the hub have."""
    name = config["model_type"]
    found = {k: v for k, v in config.items() if k not in ("layer_types", "_sliding_window_pattern", "rope_parameters")}
    rules = dict(config.get("rope_parameters") or {})
    if SLIDING in rules:
        found["rope_local_base_freq"] = rules[SLIDING]["rope_theta"]
        rules = dict(rules[FULL])
    theta, part = rules.pop("rope_theta", None), rules.pop("partial_rotary_factor", None)
    names = ("rotary_emb_base", "rotary_pct") if name == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    found |= {key: value for key, value in zip(names, (theta, part), strict=True) if value is not None}
    if rules.get("rope_type", "default") != "default":
        found["rope_scaling"] = {"type": rules.pop("rope_type"), **rules}
    return found | PATTERN.get(name, {})


def write_older(folder: Path) -> Path:
    path = folder / "config.hub.json"
    path.write_text(json.dumps(older(json.loads((folder / "config.json").read_text()))))
    return path


@torch.no_grad()
def reference(model: Any, ids: Tensor, new: int = 8) -> dict[str, Tensor]:
    """By transformers' own means: output_hidden_states, generate with its cache, and attention masks."""
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    *hidden, final = out.hidden_states
    model.generation_config.eos_token_id = None
    more = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": new}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **more)
    found = {"input_ids": ids, "logits": out.logits, "final": final}
    found |= {f"hidden.{i}": h for i, h in enumerate(hidden)}
    found |= {"greedy_ids": said.sequences[:, ids.shape[1] :], "greedy_logits": torch.stack(said.logits, 1)}
    keep = torch.ones(2, 10, dtype=torch.long)
    for side, pads in (("left", slice(0, 3)), ("right", slice(7, 10))):
        mask = keep.clone()
        mask[0, pads] = 0
        rows = ids[:, :10] * mask
        place = {} if model.config.model_type == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits = model(input_ids=rows, attention_mask=mask, use_cache=False, **place).logits
        found |= {f"{side}pad.{k}": v for k, v in (("input_ids", rows), ("attention_mask", mask), ("logits", logits))}
    return found


@torch.no_grad()
def flipped(folder: Path, name: str, theirs: Any) -> dict[str, float]:
    """How far the imported model is from theirs, by quantity, once one of its weights is turned upside down."""
    mine = import_folder(folder).model
    mine.get_parameter(name).copy_(mine.get_parameter(name).flip(0))
    return differences(mine, theirs)
