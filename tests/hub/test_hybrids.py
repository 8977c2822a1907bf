"""LFM2, Jamba and Nemotron-H, saved by Hugging Face's own classes and read back in both dialects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from assay.cost.bill import Question, bill
from assay.hub.family import read
from assay.hub.load import import_folder
from assay.measure.parity import compare
from tests.hub import tiny
from tests.hub.test_mixtures import Made, flat_rope, saved
from tests.model.hf import VOCAB, ids

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
REST: dict[str, Any] = {"max_position_embeddings": 64, "pad_token_id": 0}
MAMBA: dict[str, Any] = {"mamba_d_state": 5, "mamba_d_conv": 3, "mamba_dt_rank": 7, "mamba_proj_bias": True}
PERIODS = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
STATE: dict[str, Any] = {
    "ssm_state_size": 6,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 2,
    "conv_kernel": 3,
}
EXPERTS: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4}
EXPERTS |= {"topk_group": 2, "routed_scaling_factor": 1.7, "moe_shared_expert_intermediate_size": 14}


def lfm2() -> Made:
    """Biases, four taps, a width that is not two thirds; attention where the hub's indices say."""
    given = {**SIZES, **HEADS, **REST, "num_hidden_layers": 4, "norm_eps": 2e-3, "conv_bias": True, "conv_L_cache": 4}
    given |= {"block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3, "rope_parameters": tiny.rope()}
    config = hf.Lfm2Config(**given, layer_types=["conv", "full_attention", "conv", "full_attention"])

    def older(values: dict[str, Any]) -> None:
        flat_rope(values)
        del values["layer_types"]
        values |= {"full_attn_idxs": [1, 3], "block_ff_dim": values.pop("intermediate_size")}
        values["tie_embedding"] = values.pop("tie_word_embeddings")

    return hf.Lfm2ForCausalLM(config), older


def jamba() -> Made:
    """Attention in layers 1 and 4, experts in the even ones, a rank of its own, biases on the maps."""
    given = {**SIZES, **HEADS, **REST, **MAMBA, **PERIODS, "num_experts": 4, "num_hidden_layers": 5}
    config = hf.JambaConfig(**given, rms_norm_eps=2e-3)

    def older(values: dict[str, Any]) -> None:
        values |= {"num_logits_to_keep": 1, "mamba_inner_layernorms": True, "sliding_window": None}
        values["num_local_experts"] = values.pop("num_experts")

    return hf.JambaForCausalLM(config), older


def nemotron_h(**more: Any) -> Made:
    """Steps that are held above what they began with, experts that work on 12 numbers, groups of the state."""
    kinds = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"]
    given = {**SIZES, **HEADS, **REST, **STATE, **EXPERTS, "head_dim": 8, "layer_norm_epsilon": 2e-3}
    given |= {"moe_latent_size": 12, "time_step_min": 0.6, "time_step_max": 0.9, "layers_block_type": kinds, **more}
    config = hf.NemotronHConfig(**given)

    def older(values: dict[str, Any]) -> None:
        del values["layers_block_type"]
        values |= {"hybrid_override_pattern": "ME*-M", "num_hidden_layers": 5}

    return hf.NemotronHForCausalLM(config), older


def nemotron_h_biased() -> Made:
    """Biases in every map of the state space and of a dense layer, which has them only where there are no experts."""
    kinds = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]
    made, _ = nemotron_h(layers_block_type=kinds, use_bias=True, mlp_bias=True, time_step_min=1e-3)

    def older(values: dict[str, Any]) -> None:
        del values["layers_block_type"]
        values |= {"hybrid_override_pattern": "M-*-M"}

    return made, older


@pytest.mark.parametrize("family", [lfm2, jamba, nemotron_h, nemotron_h_biased])
def test_equals_hugging_face(family: Callable[[], Made], tmp_path: Path) -> None:
    """Logits, hidden states, padded rows, and a continuation from both libraries' caches, less what is wrong there.

    With biases, padding on the left reaches the convolution of the first tokens; the cached decoding of Nemotron-H does
    not hold the steps above their least.
    """
    theirs, folder, older = saved(family, tmp_path)
    got, hub = import_folder(folder), import_folder(folder, older)
    assert not got.unread and not got.skipped
    assert (hub.spec, hub.unread) == (got.spec, ())
    wrong = "greedy" if family is nemotron_h else "leftpad"
    found = {name: t for name, t in tiny.reference(theirs, ids(2, 14)).items() if not name.startswith(wrong)}
    report = compare(got, found)
    assert report.match, report
    assert {"leftpad.logits", "rightpad.logits", "greedy_ids"} - {row.quantity for row in report.rows} == (
        {"greedy_ids"} if family is nemotron_h else {"leftpad.logits"}
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (lfm2, "blocks.0.mixer.b.weight"),
        (lfm2, "blocks.2.mixer.shift"),
        (jamba, "blocks.0.mixer.b_norm.weight"),
        (jamba, "blocks.2.mixer.select.weight"),
        (nemotron_h, "blocks.4.mixer.dt_bias"),
        (nemotron_h, "blocks.1.ffn.into.weight"),
    ],
)
def test_a_changed_weight_is_seen(family: Callable[[], Made], name: str, tmp_path: Path) -> None:
    theirs, folder, _ = saved(family, tmp_path)
    assert max(tiny.flipped(folder, name, theirs).values()) > 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            lfm2,
            {"layer_types": ["conv", "mamba", "conv", "conv"]},
            "layer_types: 'mamba'; accepted: full_attention, conv",
        ),
        (jamba, {"mamba_inner_layernorms": False}, "mamba_inner_layernorms: False; accepted: true"),
        (jamba, {"sliding_window": 5}, "sliding_window: 5; accepted: "),
        (nemotron_h, {"mlp_bias": True}, "mlp_bias: True; accepted: false .its experts have none"),
        (nemotron_h, {"layers_block_type": None, "hybrid_override_pattern": "MX"}, "'X'; accepted: M, E, "),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    family: Callable[[], Made], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, folder, _ = saved(family, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        import_folder(folder)


def published(config: Any) -> Any:
    values = config.to_dict()
    values.pop("is_encoder_decoder", None)
    return read(values)


def test_jamba_as_published() -> None:
    """52B parameters of which 12B serve a token, and 4 GB of state for 256K tokens of 16 bits (arXiv 2403.19887, table
    1): 4 layers of 8 key heads of 128. Mamba's states, in float32, are 1.5 hundredths more."""
    found = published(hf.JambaConfig())
    told = bill(found.spec, Question(262_144))
    assert not found.unread
    assert round(told.params["total"] / 1e9, 1) == 51.6 and round(told.params["active"] / 1e9, 1) == 12.1
    assert told.state_bytes_per_token == 4 * 2 * 8 * 128 * 2
    constant = 28 * (3 * 8192 * 2 + 8192 * 16 * 4)
    assert told.state_bytes == 262_144 * told.state_bytes_per_token + constant


def test_lfm2_as_published() -> None:
    """LFM2-1.2B: 1,170,340,608 parameters (its model card), 10 convolutions and 6 layers of attention, 1.17B."""
    kinds = ["conv"] * 16
    for layer in (2, 5, 8, 10, 12, 14):
        kinds[layer] = "full_attention"
    found = published(
        hf.Lfm2Config(hidden_size=2048, num_hidden_layers=16, intermediate_size=12_288, layer_types=kinds)
    )
    told = bill(found.spec, Question(32_768))
    assert not found.unread and told.params["total"] == 1_170_340_608
    assert told.state_bytes_per_token == 6 * 2 * 8 * 64 * 2
    assert told.state_bytes - 32_768 * told.state_bytes_per_token == 10 * 2 * 2048 * 2
