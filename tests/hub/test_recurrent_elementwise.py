"""Mamba, Falcon Mamba, RecurrentGemma and RWKV, saved by Hugging Face's own classes and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from assay.cost.bill import Question, bill
from assay.hub.family import read
from assay.hub.load import import_folder
from assay.measure.parity import compare
from tests.hub import tiny
from tests.model.hf import VOCAB, ids, randomised

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3}
STATE = {"state_size": 5, "time_step_rank": 3, "conv_kernel": 3, "expand": 3, "layer_norm_epsilon": 2e-3}
GRIFFIN: dict[str, Any] = {
    **SIZES,
    "hidden_size": 40,  # whose root bfloat16 does not hold
    "num_hidden_layers": 4,
    "intermediate_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "lru_width": 32,
    "conv1d_width": 3,
    "attention_window_size": 5,
    "logits_soft_cap": 3.0,
    "rms_norm_eps": 2e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.4},
}
TIME = {**SIZES, "attention_hidden_size": 20, "intermediate_size": 28, "layer_norm_epsilon": 2e-3}
RESCALED = {"rescale_every": 2, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-12}  # a half of it would show
MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba": (hf.MambaConfig, hf.MambaForCausalLM, {**SIZES, **STATE, "use_bias": True}),
    "mamba-auto": (hf.MambaConfig, hf.MambaForCausalLM, {**SIZES, "use_conv_bias": False, "hidden_act": "gelu"}),
    "falcon_mamba": (hf.FalconMambaConfig, hf.FalconMambaForCausalLM, {**SIZES, **STATE, "mixer_rms_eps": 0.02}),
    "recurrent_gemma": (hf.RecurrentGemmaConfig, hf.RecurrentGemmaForCausalLM, GRIFFIN),
    "recurrent_gemma-bias": (
        hf.RecurrentGemmaConfig,
        hf.RecurrentGemmaForCausalLM,
        {**GRIFFIN, "attention_bias": True, "block_types": ["attention", "recurrent"]},
    ),
    "rwkv": (hf.RwkvConfig, hf.RwkvForCausalLM, {**TIME, "rescale_every": 0}),
    "rwkv-rescaled": (hf.RwkvConfig, hf.RwkvForCausalLM, {**TIME, **RESCALED}),
}


def told(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    values.pop("is_encoder_decoder", None)
    return values


def layers_of(model: Any) -> nn.ModuleList:
    inner = next(getattr(model, name) for name in ("backbone", "rwkv", "model") if hasattr(model, name))
    return inner.blocks if hasattr(inner, "blocks") else inner.layers


@torch.no_grad()
def reference(model: Any, x: Tensor, new: int = 4) -> dict[str, Tensor]:
    """Logits and each layer's input from one pass, and a continuation from whole passes without a cache, row by row."""
    found: dict[str, Tensor] = {"input_ids": x}

    def hear(place: int) -> Any:
        return lambda _, given: found.update({f"hidden.{place}": given[0].clone()})

    hooks = [layer.register_forward_pre_hook(hear(i)) for i, layer in enumerate(layers_of(model))]
    found["logits"] = model(x, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    said, steps = x, []
    for _ in range(new):
        steps.append(torch.cat([model(row[None], use_cache=False).logits[:, -1] for row in said]))
        said = torch.cat([said, steps[-1].argmax(-1, keepdim=True)], 1)
    return {**found, "greedy_ids": said[:, x.shape[1] :], "greedy_logits": torch.stack(steps, 1)}


@pytest.mark.parametrize("name", MADE)
def test_it_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    config, model, values = MADE[name]
    theirs = randomised(model(config(**values)), seed=3)
    theirs.save_pretrained(tmp_path)
    got = import_folder(tmp_path)
    expected = reference(theirs, ids(2, 14))
    if name == "rwkv-rescaled":  # the stream is halved behind every second layer, which no logit shows
        expected = {key: value for key, value in expected.items() if key not in ("hidden.2", "hidden.3")}
    report = compare(got, expected)
    assert report.match, report
    assert got.unread == ()
    older = tiny.older(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "older.json").write_text(json.dumps(older))
    hub = import_folder(tmp_path, tmp_path / "older.json")
    assert (hub.spec, hub.unread) == (got.spec, ())


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "recurrent_gemma", "rwkv"])
def test_default_configurations_are_as_large_as_theirs(name: str) -> None:
    """The number of parameters, counted by transformers without allocating them."""
    config, model, _ = MADE[name]
    values = told(config())
    found = read(values)
    with torch.device("meta"):
        theirs = model(config())
    own = {id(p): p.numel() for p in theirs.parameters()}
    head = theirs.get_output_embeddings().weight
    tied = values["tie_word_embeddings"] and head is not theirs.get_input_embeddings().weight
    assert bill(found.spec, Question(2048)).params["total"] == sum(own.values()) - (head.numel() if tied else 0)
    assert not found.unread


def test_what_a_recurrence_remembers_has_no_length() -> None:
    """Mamba-130M: 24 layers of 1536 channels with 16 numbers in float32 and 3 tokens of the convolution."""
    found = read(told(hf.MambaConfig(num_hidden_layers=24)))
    sizes = {bill(found.spec, Question(n)).state_bytes for n in (10, 100_000)}
    assert sizes == {24 * 1536 * (16 * 4 + 3 * 2)}
    assert bill(found.spec, Question(10)).params["total"] == 129_135_360


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_types": ["recurrent", "mamba"]}, "block_types: .*a list of 'recurrent' and 'attention' is expected"),
        ({"block_types": []}, "block_types: .*a list of 'recurrent' and 'attention' is expected"),
        ({"lru_width": 30}, r"`width` \(30\) is not a multiple of `heads` \(4\)"),
        ({"conv1d_width": 1}, "conv1d_width: 1; an integer from 2 to"),
    ],
)
def test_what_nobody_can_be_meant_by_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({**hf.RecurrentGemmaConfig(**GRIFFIN).to_dict(), **changes})
