"""DeepSeek-V3 and V3.2, saved by Hugging Face's own classes and read back in both dialects; what their papers say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from assay.cost.bill import Question, bill
from assay.hub.family import read
from assay.hub.load import import_folder
from assay.measure.parity import compare
from tests.hub import tiny
from tests.hub.test_mixtures import Made, flat_rope, saved
from tests.model.hf import VOCAB, ids

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3}
LATENT: dict[str, Any] = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "attn_implementation": "eager", **LATENT}
EXPERTS: dict[str, Any] = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4}
EXPERTS |= {"topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.7}
REST: dict[str, Any] = {"max_position_embeddings": 64, "rms_norm_eps": 2e-3, "pad_token_id": 0, "attention_bias": True}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.25}
YARN |= {"original_max_position_embeddings": 16, "mscale": 0.8, "mscale_all_dim": 1.2}


def v3(**more: Any) -> Made:
    """YaRN whose two mscales differ, so that both the turn and the logits are scaled."""
    given = {**SIZES, **HEADS, **EXPERTS, **REST, "q_lora_rank": 14, "rope_parameters": YARN, **more}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**given)), flat_rope


def v3_plain() -> Made:
    """Queries without a latent, and a lone mscale."""
    rope = {k: v for k, v in YARN.items() if k != "mscale"}
    return v3(q_lora_rank=None, attention_bias=False, rope_parameters=rope)


def v32() -> Made:
    """Four keys of up to fourteen. Sixteen index heads: with few, sums of relus are often 0, and equal."""
    index = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 16}
    config = hf.DeepseekV32Config(**SIZES, **HEADS, **EXPERTS, **REST, **index, q_lora_rank=14, rope_parameters=YARN)

    def older(values: dict[str, Any]) -> None:
        flat_rope(values)
        del values["layer_types"], values["mlp_layer_types"]

    return hf.DeepseekV32ForCausalLM(config), older


@pytest.mark.parametrize("family", [v3, v3_plain, v32])
def test_equals_hugging_face(family: Callable[[], Made], tmp_path: Path) -> None:
    """Logits, hidden states, padded rows, and a continuation from both libraries' caches, ours of latents."""
    theirs, folder, older = saved(family, tmp_path)
    got, hub = import_folder(folder), import_folder(folder, older)
    assert not got.unread and not got.skipped
    assert (hub.spec, hub.unread) == (got.spec, ())
    report = compare(got, tiny.reference(theirs, ids(2, 14)))
    assert report.match, report


@pytest.mark.parametrize(
    "name", ["mixer.q_norm.weight", "mixer.kv_down.bias", "mixer.select.k_norm.bias", "mixer.select.weigh.weight"]
)
def test_a_changed_weight_is_seen(name: str, tmp_path: Path) -> None:
    theirs, folder, _ = saved(v32, tmp_path)
    assert max(tiny.flipped(folder, f"blocks.1.{name}", theirs).values()) > 1e-3


def test_the_layer_that_predicts_a_further_token_is_left_out(tmp_path: Path) -> None:
    _, folder, _ = saved(v3, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    further = {f"model.layers.3.{name}": torch.ones(24) for name in ("enorm.weight", "shared_head.norm.weight")}
    save_file({**tensors, **further}, folder / "model.safetensors", {"format": "pt"})
    assert import_folder(folder).skipped == dict.fromkeys(further, "a layer that predicts a further token")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave: False; accepted: true"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2; accepted: 4 .all heads share one latent"),
        ({"kv_lora_rank": None}, None),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    """A size that is not given is transformers' default, which these tensors do not have."""
    _, folder, _ = saved(v3, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message or r"the configuration says \(516, 24\)"):
        import_folder(folder)


def config(made: Any) -> dict[str, Any]:
    values: dict[str, Any] = made.to_dict()
    values.pop("is_encoder_decoder", None)
    return values


def test_deepseek_v3_as_published() -> None:
    """671B parameters, of which 37B serve a token (arXiv 2412.19437, abstract); the exact count is that of the released
    tensors without their layer 61. 61 layers remember 512 + 64 numbers of two bytes a token."""
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    found = read(config(hf.DeepseekV3Config(rope_parameters=rope, max_position_embeddings=163_840)))
    told = bill(found.spec, Question(4096))
    assert not found.unread and told.params["total"] == 671_026_419_200
    assert round((told.params["active"] - 129_280 * 7168) / 1e9) == 37
    assert told.state_bytes_per_token == 61 * (512 + 64) * 2 == 70_272
    mixer: Any = found.spec.blocks["sparse"].mixer
    assert mixer.scale == pytest.approx(0.1352337788608801)  # 192^-0.5 (0.1 ln 40 + 1)^2


def test_deepseek_v32_as_published() -> None:
    """An indexer of 64 heads of 128 in each layer, which remembers 128 more numbers a token. One decoded token at 128K
    attends to 2048 latents, and its indexer looks at all."""
    found = read(config(hf.DeepseekV32Config(num_hidden_layers=61)))
    told, one = bill(found.spec, Question(131_072)), found.spec.site(5).child("mixer")
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128
    assert told.params["total"] == 671_026_419_200 + 61 * indexer
    assert told.state_bytes_per_token == 61 * (512 + 64 + 128) * 2
    mixer: Any = found.spec.blocks["sparse"].mixer
    assert mixer.cost(one, 1, 131_071).flops == 2 * 128 * (512 + 64 + 512) * 2048
    place = mixer.children(one)["select"][1]
    assert mixer.select.cost(place, 1, 131_071).flops == 131_072 * 2 * 64 * 129
