"""Published mixtures of experts from their configurations: parameters against reports and Hugging Face's classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from assay.cost.bill import Question, bill
from assay.hub.family import read

QWEN3: dict[str, Any] = {"vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128}
QWEN3 |= {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
QWEN3 |= {"moe_intermediate_size": 768, "norm_topk_prob": True}
AIR: dict[str, Any] = {"head_dim": 128, "attention_bias": True}
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt-oss-20b": (hf.GptOssForCausalLM, hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32)),
    "gpt-oss-120b": (hf.GptOssForCausalLM, hf.GptOssConfig()),
    "qwen3-30b-a3b": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**QWEN3)),
    "llama-4-scout": (hf.Llama4ForCausalLM, hf.Llama4TextConfig()),
    "glm-4.5-air": (hf.Glm4MoeForCausalLM, hf.Glm4MoeConfig(**AIR)),
}
# Billions, total and active, as printed by their authors: gpt-oss in arXiv 2508.10925, table 1, which leaves the input
# table out of the active ones; Qwen3-30B-A3B and Llama 4 Scout on their model cards, Scout with its vision tower.
PUBLISHED = {
    "gpt-oss-20b": ("20.91", "3.61"),
    "gpt-oss-120b": ("116.83", "5.13"),
    "qwen3-30b-a3b": ("30.5", "3.3"),
    "llama-4-scout": ("109", "17"),
}
EXACT = {"gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "qwen3-30b-a3b": 30_532_122_624}


def billed(name: str) -> dict[str, int]:
    values = MODELS[name][1].to_dict()
    values.pop("is_encoder_decoder", None)
    found = read(values)
    assert not found.unread
    return bill(found.spec, Question(16)).params


@pytest.mark.parametrize("name", MODELS)
def test_as_many_as_the_class_of_hugging_face_has(name: str) -> None:
    """Built without memory. Selection biases are buffers there."""
    make, config = MODELS[name]
    with torch.device("meta"):
        theirs = make(config)
    drawn = sum(p.numel() for p in theirs.parameters())
    drawn += sum(b.numel() for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias"))
    assert billed(name)["total"] == drawn == EXACT.get(name, drawn)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    """To one unit of the last digit that was printed: whether the authors rounded or cut off is not said."""
    told = billed(name)
    total, active = told["total"], told["active"]
    if name.startswith("gpt-oss"):
        active -= 201_088 * 2880
    if name == "llama-4-scout":
        with torch.device("meta"):
            total += sum(p.numel() for p in hf.Llama4VisionModel(hf.Llama4VisionConfig()).parameters())
    for ours, printed in zip((total, active), PUBLISHED[name], strict=True):
        unit = 10.0 ** -len(printed.partition(".")[2])
        assert abs(ours / 1e9 - float(printed)) < unit
