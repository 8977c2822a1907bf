"""Families of recurrences with a decay, saved by Hugging Face's own classes and read back in both dialects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from assay.hub.config import Config
from assay.hub.families import mamba2 as mamba2_family
from assay.hub.load import import_folder
from assay.measure.parity import compare
from assay.spec import registry
from assay.spec.base import Site
from tests.hub import tiny
from tests.model.hf import VOCAB, ids, randomised

Older = Callable[[dict[str, Any]], None]
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3}
STATES: dict[str, Any] = {"num_heads": 6, "head_dim": 8, "state_size": 5, "n_groups": 2, "conv_kernel": 3}


def mamba2() -> tuple[nn.Module, Older]:
    """Groups, biases, bounds on the time step that act, chunks shorter than the text."""
    rest: dict[str, Any] = {"layer_norm_epsilon": 2e-3, "time_step_limit": [0.3, 1.1], "pad_token_id": 0}
    config = hf.Mamba2Config(**SIZES, **STATES, **rest, use_bias=True, chunk_size=4)

    def older(config: dict[str, Any]) -> None:
        config |= {"rms_norm": True, "norm_before_gate": False, "hidden_act": "swish"}

    return hf.Mamba2ForCausalLM(config), older


def minimax(window: int | None = None) -> tuple[nn.Module, Older]:
    """Lightning and full attention, factors of every kind, blocks shorter than the text."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 20}
    factors = {"full_attn_alpha_factor": 1.2, "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.1}
    factors |= {"linear_attn_beta_factor": 0.9, "mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.7}
    rest = {"max_position_embeddings": 64, "rms_norm_eps": 2e-3, "block_size": 4, "pad_token_id": 0}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    rest |= {"layer_types": kinds, "num_local_experts": 4, "rope_parameters": tiny.rope(), "sliding_window": window}
    config = hf.MiniMaxConfig(**SIZES, **heads, **factors, **rest, attn_implementation="eager")  # type: ignore[arg-type]

    def older(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]

    return hf.MiniMaxForCausalLM(config), older


def windowed() -> tuple[nn.Module, Older]:
    return minimax(5)


FAMILIES = (mamba2, minimax, windowed)


def saved(family: Callable[[], tuple[nn.Module, Older]], folder: Path) -> tuple[nn.Module, Path]:
    """The model drawn and saved; its configuration in the hub's dialect beside it."""
    model, older = family()
    randomised(model).save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    older(config)
    (folder / "config.hub.json").write_text(json.dumps(config))
    return model, folder / "config.hub.json"


def reference(model: Any, new: int = 8) -> dict[str, Tensor]:
    """What transformers computes. Its Mamba-2 leaves the embedding out of the hidden states: the first is a layer's;
    with biases, padding on the left reaches the convolution of the first tokens."""
    found = tiny.reference(model, ids(2, 14), new)
    if model.config.model_type != "mamba2":
        return found
    if model.config.use_bias:
        found = {name: t for name, t in found.items() if not name.startswith("leftpad")}
    layers = {f"hidden.{i + 1}": found.pop(f"hidden.{i}") for i in range(SIZES["num_hidden_layers"])}
    return found | layers


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_in_both_dialects(family: Callable[[], Any], tmp_path: Path) -> None:
    """Logits, every layer's output and padded rows; no key unread, no tensor left over but tables."""
    theirs, older = saved(family, tmp_path)
    expected = reference(theirs, new=1)
    for config in (None, older):
        mine = import_folder(tmp_path, config)
        assert not mine.unread and all("decay" in n or "slope" in n for n in mine.skipped)
        report = compare(mine, expected)
        assert report.match and len(report.rows) >= 8, report


@torch.no_grad()
def test_a_cache_goes_on_as_transformers_does(tmp_path: Path) -> None:
    """Greedy tokens from both caches; without what transformers' cached step computes differently from its full pass:
    bounds on Mamba-2's time step, and MiniMax's window."""
    model = randomised(hf.Mamba2ForCausalLM(hf.Mamba2Config(**SIZES, **STATES, chunk_size=4)))
    model.save_pretrained(tmp_path / "mamba2")  # type: ignore[operator]
    for name, theirs in (("mamba2", model), ("minimax", saved(minimax, tmp_path / "minimax")[0])):
        report = compare(import_folder(tmp_path / name), reference(theirs))
        assert report.match, report


def test_lightning_forgets_as_minimax_does() -> None:
    """Slopes of every head in every layer, next to none in the last, as transformers makes them (in float32)."""
    config = hf.MiniMaxConfig(**SIZES, num_attention_heads=6)
    spec: Any = registry.get("mixers", "lightning").model_validate({"kind": "lightning", "heads": 6})
    for layer in range(3):
        theirs = MiniMaxLightningAttention(config, layer).get_slope_rate().flatten()
        ours = torch.tensor(spec.slopes(Site(layer=layer, layers=3)))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        assert ours[0] > 2e-6


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (mamba2, "blocks.1.mixer.conv"),
        (mamba2, "blocks.0.mixer.dt.bias"),
        (mamba2, "blocks.2.mixer.norm"),
        (minimax, "blocks.0.mixer.gate_map.weight"),
        (minimax, "blocks.2.mixer.norm.weight"),
        (minimax, "blocks.1.residual1.norm.weight"),
    ],
)
def test_a_changed_weight_is_seen(family: Callable[[], Any], name: str, tmp_path: Path) -> None:
    theirs, _ = saved(family, tmp_path)
    assert tiny.flipped(tmp_path, name, theirs)["logits"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_heads": 5}, "num_heads: 5; expand . hidden_size / head_dim is expected"),
        ({"norm_before_gate": True}, "norm_before_gate: True; accepted: false"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; accepted"),
        ({"time_step_limit": [0.0]}, "time_step_limit: .* a list of 2 is expected"),
        ({"time_step_limit": ["a", 1.0]}, "time_step_limit: .* two numbers"),
    ],
)
def test_what_is_not_read_is_refused(changes: dict[str, Any], told: str) -> None:
    values = hf.Mamba2Config(**SIZES, **STATES).to_dict()
    with pytest.raises(ValueError, match=told):
        mamba2_family.spec(Config({**values, **changes}))
