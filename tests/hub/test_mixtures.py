"""Families with mixtures of experts, saved by Hugging Face's own classes and read back in both dialects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from assay.hub.load import import_folder
from assay.measure.parity import compare
from tests.hub import tiny
from tests.model.hf import VOCAB, assert_equal, randomised

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
REST: dict[str, Any] = {"max_position_embeddings": 64, "rms_norm_eps": 2e-3, "attn_implementation": "eager"}
Older = Callable[[dict[str, Any]], None]
Made = tuple[nn.Module, Older]


def flat_rope(config: dict[str, Any]) -> None:
    """`rope_parameters` as the keys that files on the hub carry."""
    rules = config.pop("rope_parameters")
    config["rope_theta"] = rules.pop("rope_theta")
    if "partial_rotary_factor" in rules:
        config["partial_rotary_factor"] = rules.pop("partial_rotary_factor")
    config["rope_scaling"] = None if rules["rope_type"] == "default" else rules


def gpt_oss() -> Made:
    """Sinks, windows, YaRN without truncation, biases everywhere, a clamp low enough to act."""
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": 300.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    rope |= {"beta_fast": 2.0, "beta_slow": 0.25, "truncate": False}
    experts: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 0.9,
        "swiglu_alpha": 1.4,
    }
    config = hf.GptOssConfig(**SIZES, **HEADS, **REST, **experts, rope_parameters=rope, sliding_window=5)

    def older(config: dict[str, Any]) -> None:
        flat_rope(config)
        del config["layer_types"]

    return hf.GptOssForCausalLM(config), older


def glm4_moe() -> Made:
    """Groups, a selection bias, a shared expert, shares that are scaled; a dense first layer."""
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_shared_experts": 2}
    experts |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}
    config = hf.Glm4MoeConfig(**SIZES, **HEADS, **REST, **experts, use_qk_norm=True, attention_bias=True)
    return hf.Glm4MoeForCausalLM(config), flat_rope


def llama4() -> Made:
    """Chunks and positions in three layers of four, temperature in the fourth, experts in every other layer."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2}
    long = {"attention_chunk_size": 6, "floor_scale": 3, "attn_scale": 0.4}
    config = hf.Llama4TextConfig(**SIZES, **HEADS, **REST, **experts, **long, intermediate_size_mlp=28)

    def older(config: dict[str, Any]) -> None:
        flat_rope(config)
        for name in ("layer_types", "moe_layers", "no_rope_layers"):
            del config[name]

    return hf.Llama4ForCausalLM(config), older


GEMMA: dict[str, Any] = {"sliding_window": 5, "attention_k_eq_v": True, "final_logit_softcapping": 5.0}
GEMMA |= {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA |= {"per_layer_config": {i: {"head_dim": 16, "num_key_value_heads": 1} for i in (1, 3)}}


def global_keys(config: dict[str, Any]) -> None:
    del config["per_layer_config"]
    config |= {"global_head_dim": 16, "num_global_key_value_heads": 1}


def gemma4() -> Made:
    """Keys shared by the last two layers, whose dense networks are twice as wide."""
    config = hf.Gemma4TextConfig(**SIZES, **HEADS, **REST, **GEMMA, num_kv_shared_layers=2, use_double_wide_mlp=True)
    return hf.Gemma4ForCausalLM(config), global_keys


def gemma4_mixture() -> Made:
    """Experts beside the dense network, a router with a norm of its own, and no embedding a layer."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}
    config = hf.Gemma4TextConfig(**SIZES, **HEADS, **REST, **{**GEMMA, "hidden_size_per_layer_input": 0}, **experts)
    return hf.Gemma4ForCausalLM(config), global_keys


FAMILIES = (gpt_oss, glm4_moe, llama4, gemma4, gemma4_mixture)


def saved(make: Callable[[], Made], folder: Path) -> tuple[nn.Module, Path, Path]:
    """The model with every parameter and buffer drawn, saved; its configuration in the hub's dialect beside it."""
    model, older = make()
    randomised(model)
    g = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if "inv_freq" not in name and buffer.dtype.is_floating_point and "embed_scale" not in name:
            buffer.copy_(torch.rand(buffer.shape, generator=g) * 0.4 + 0.6)
    model.save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    older(config)
    (folder / "config.hub.json").write_text(json.dumps(config))
    return model, folder, folder / "config.hub.json"


def llama4_beside_images() -> Made:
    sight = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sight |= {"image_size": 28, "patch_size": 14, "projector_input_dim": 16, "projector_output_dim": 16}
    vision = hf.Llama4VisionConfig(**sight, vision_output_dim=16, pixel_shuffle_ratio=1.0)
    text, older = llama4()
    config = hf.Llama4Config(text_config=text.config, vision_config=vision)  # type: ignore[arg-type]
    return hf.Llama4ForConditionalGeneration(config), lambda c: older(c["text_config"])


def gemma4_beside_images() -> Made:
    config = hf.Gemma4Config(text_config=gemma4()[0].config)  # type: ignore[arg-type]
    return hf.Gemma4ForConditionalGeneration(config), lambda c: global_keys(c["text_config"])


@pytest.mark.parametrize(("family", "left"), [(llama4_beside_images, "vision_model"), (gemma4_beside_images, None)])
def test_the_language_model_of_one_that_sees(family: Callable[[], Made], left: str | None, tmp_path: Path) -> None:
    """The tensors of what sees are left with the reason, and an unread key inside the configuration is told."""
    theirs, folder, older = saved(family, tmp_path)
    config = json.loads(older.read_text())
    config["text_config"]["unheard_of"] = 3
    older.write_text(json.dumps(config))
    for path in (None, older):
        mine = import_folder(folder, path)
        assert mine.unread == (() if path is None else ("text_config.unheard_of",))
        assert any(name.startswith(left) for name in mine.skipped) if left else not mine.skipped
        assert_equal(mine.model, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family: Callable[[], Made], tmp_path: Path) -> None:
    """Logits and every layer's output; no key of the configuration unread, no tensor left over."""
    theirs, folder, older = saved(family, tmp_path)
    for config in (None, older):
        mine = import_folder(folder, config)
        assert not mine.unread and not mine.skipped
        still = {n.rpartition(".")[2] for n, p in mine.model.named_parameters() if not p.requires_grad}
        assert still == ({"select_bias"} if family is glm4_moe else set())
        assert_equal(mine.model, theirs)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (gpt_oss, "blocks.1.ffn.up_bias"),
        (gpt_oss, "blocks.0.ffn.router.map.bias"),
        (glm4_moe, "blocks.1.ffn.router.select_bias"),
        (glm4_moe, "blocks.1.ffn.shared.down.weight"),
        (llama4, "blocks.1.ffn.shared.gate.weight"),
        (gemma4, "blocks.0.per_layer.table"),
        (gemma4_mixture, "blocks.0.experts.router.expert_gain"),
        (gemma4_mixture, "blocks.0.experts.router.norm.weight"),
    ],
)
def test_a_changed_weight_is_seen(family: Callable[[], Made], name: str, tmp_path: Path) -> None:
    theirs, folder, _ = saved(family, tmp_path)
    assert max(tiny.flipped(folder, name, theirs).values()) > 1e-3


@pytest.mark.usefixtures("compiled")
def test_a_decode_run_again_reads_borrowed_keys_as_far_as_they_go(tmp_path: Path) -> None:
    """From the third token on a tape runs: whose mask was made where it cannot see would show every step the same."""
    model, folder, _ = saved(gemma4, tmp_path)
    ids = torch.arange(24).view(2, 12) * 7 % VOCAB
    report = compare(import_folder(folder), tiny.reference(model, ids))
    assert {"greedy_ids", "greedy_logits"} <= {row.quantity for row in report.rows} and report.match, report
