"""Qwen3-Next and Kimi Linear, saved by Hugging Face's own classes and read back in both dialects; as published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from assay.cost.bill import Question, bill
from assay.hub.family import read
from assay.hub.load import import_folder
from assay.measure.parity import compare
from tests.hub import tiny
from tests.hub.test_mixtures import Made, flat_rope, saved
from tests.model.hf import VOCAB, ids

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4}
REST: dict[str, Any] = {"rms_norm_eps": 2e-3, "pad_token_id": 0, "attn_implementation": "eager"}


def qwen3_next() -> Made:
    """Two heads of values to one of keys, of another size; a dense layer; a quarter of each head turned."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6}
    linear |= {"linear_value_head_dim": 5, "linear_conv_kernel_dim": 3}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False}
    experts |= {"shared_expert_intermediate_size": 12, "mlp_only_layers": [1]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = hf.Qwen3NextConfig(**SIZES, **REST, **linear, **experts, **heads)

    def older(values: dict[str, Any]) -> None:
        flat_rope(values)
        del values["layer_types"], values["rope_scaling"]
        values["full_attention_interval"] = 4

    return hf.Qwen3NextForCausalLM(config), older


def kimi_linear(**more: Any) -> Made:
    """One layer in three of latent attention; groups of experts."""
    linear = {"linear_num_heads": 3, "linear_head_dim": 6, "linear_conv_kernel_dim": 3}
    latent = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4}
    experts |= {"topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.7}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    layers = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
    config = hf.KimiLinearConfig(**{**SIZES, **REST, **linear, **latent, **experts, **heads, **layers, **more})

    def older(values: dict[str, Any]) -> None:
        del values["layer_types"], values["mlp_layer_types"]
        values |= {"first_k_dense_replace": 1, "mla_use_nope": True, "moe_router_activation_func": "sigmoid"}
        taps = values.pop("linear_conv_kernel_dim")
        inner = {"head_dim": values.pop("linear_head_dim"), "num_heads": values.pop("linear_num_heads")}
        values["linear_attn_config"] = {**inner, "full_attn_layers": [2], "kda_layers": [1, 3, 4]}
        values["linear_attn_config"]["short_conv_kernel_size"] = taps

    return hf.KimiLinearForCausalLM(config), older


def kimi_queries() -> Made:
    """Queries from a latent too."""
    return kimi_linear(q_lora_rank=7)


@pytest.mark.parametrize("family", [qwen3_next, kimi_linear, kimi_queries])
def test_equals_hugging_face(family: Callable[[], Made], tmp_path: Path) -> None:
    """Logits, hidden states, padded rows, and a continuation from both libraries' caches, ours of states and tails."""
    theirs, folder, older = saved(family, tmp_path)
    got, hub = import_folder(folder), import_folder(folder, older)
    assert not got.unread and not got.skipped
    assert (hub.spec, hub.unread) == (got.spec, ())
    report = compare(got, tiny.reference(theirs, ids(2, 14)))
    assert report.match, report


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (qwen3_next, "mixer.a_log"),
        (qwen3_next, "mixer.k_conv"),
        (qwen3_next, "mixer.gate.weight"),
        (qwen3_next, "mixer.decay.weight"),
        (kimi_linear, "mixer.dt_bias"),
        (kimi_linear, "mixer.v_conv"),
        (kimi_linear, "mixer.gate_up.weight"),
        (kimi_linear, "mixer.beta.weight"),
    ],
)
def test_a_changed_weight_is_seen(family: Callable[[], Made], name: str, tmp_path: Path) -> None:
    theirs, folder, _ = saved(family, tmp_path)
    assert max(tiny.flipped(folder, f"blocks.2.{name}", theirs).values()) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (qwen3_next, {"attention_bias": True}, "attention_bias: True; accepted: false"),
        (qwen3_next, {"layer_types": ["full_attention"] * 3 + ["other"]}, "layer_types: 'other'; accepted: linear_"),
        (qwen3_next, {"hidden_act": "gelu"}, "hidden_act: 'gelu'; accepted: \"silu\""),
        (kimi_linear, {"mla_use_nope": False}, "mla_use_nope: False; accepted: true"),
        (
            kimi_linear,
            {"mlp_layer_types": ["dense"] * 3 + ["none"]},
            "mlp_layer_types: 'none'; accepted: dense, sparse",
        ),
        (
            kimi_linear,
            {"layer_types": None, "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1, 3]}},
            "kda_layers .1, 3.; each layer of 1 to 4 is expected in one of them",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(family: Callable[[], Made], changes: dict[str, Any], message: str) -> None:
    values = {**json.loads(family()[0].config.to_json_string()), **changes}  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=message):
        read(values)


@pytest.mark.parametrize(
    ("make", "config", "total", "active"),
    [
        (hf.Qwen3NextForCausalLM, hf.Qwen3NextConfig(), 79.7, 3.9),
        (hf.KimiLinearForCausalLM, hf.KimiLinearConfig(), 49.1, 3.5),
    ],
)
def test_as_published(make: Any, config: Any, total: float, active: float) -> None:
    """transformers' defaults are Qwen3-Next-80B-A3B (48 layers) and Kimi-Linear-48B-A3B (27 layers): as many numbers as
    their modules have, and a state that grows only in the layers that attend."""
    found = read(json.loads(config.to_json_string()))
    with torch.device("meta"):
        theirs = make(config)
    told = bill(found.spec, Question(4096))
    count = sum(p.numel() for p in theirs.parameters())
    biases = sum(b.numel() for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
    assert not found.unread and told.params["total"] == count + biases
    assert round(told.params["total"] / 1e9, 1) == total and round(told.params["active"] / 1e9, 1) == active
    each = 2 * 2 * 256 * 2 if "Qwen" in make.__name__ else (512 + 64) * 2
    assert told.state_bytes_per_token == sum(name.startswith("full") for name in found.spec.plan) * each
