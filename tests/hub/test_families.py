"""Every family, in both dialects of its configuration, computes what transformers does; bad checkpoints are refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.hub.family import families
from assay.hub.live import open_live
from assay.hub.load import import_folder
from assay.measure.isolate import alone
from assay.measure.parity import compare, ordered, raw_keys, step_error
from assay.ops.step import rows_step
from tests.hub import tiny
from tests.model.hf import ids

logging.getLogger("transformers").setLevel(logging.ERROR)
Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_family_equals_transformers_in_both_dialects(name: str, tmp_path: Path) -> None:
    """Logits, hidden states, padded rows, and a continuation from both libraries' caches."""
    theirs = tiny.save(name, tmp_path)
    got = import_folder(tmp_path)
    report = compare(got, tiny.reference(theirs, ids(2, 14)))
    assert report.match, report
    assert report.absent == (f"hidden.{got.spec.layers}: not in the reference",)
    assert len(report.rows) == got.spec.layers + 6
    assert got.unread == ()
    hub = import_folder(tmp_path, tiny.write_older(tmp_path))
    assert (hub.spec, hub.unread) == (got.spec, ())


def test_the_families_of_these_tests_are_there() -> None:
    assert tiny.FAMILIES.keys() <= families().keys()


@pytest.mark.parametrize("name", ["cohere2", "phi3", "bloom", "mixtral"])
def test_transformers_as_it_is_hooked_says_the_same(name: str, tmp_path: Path) -> None:
    """The hooks' reference against output_hidden_states and generate; inside each block every step agrees with ours."""
    theirs = tiny.save(name, tmp_path)
    got, x = import_folder(tmp_path), ids(2, 14)
    live = open_live(tmp_path, got.family, got.spec)
    hooked, plain = live.reference(x), tiny.reference(theirs, x)
    for key in plain.keys() & hooked.keys() - {k for k in plain if "pad." in k}:
        torch.testing.assert_close(hooked[key], plain[key], rtol=1e-4, atol=1e-4)
    assert plain.keys() <= hooked.keys()
    steps = {"bloom": 4, "cohere2": 7, "mixtral": 10}.get(name, 8)
    for layer in range(got.spec.layers):
        ours, inside = alone(got.model, rows_step(x), hooked, layer).inside, live.inside(layer, x)
        shared = [step for step in ordered(ours) if step in inside]
        assert len(shared) == steps
        for step in set(shared) - raw_keys(got.spec, layer):
            assert step_error(step, ours[step], inside[step]) < 1e-5, step


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny.save("llama", tmp_path)
    return tmp_path


def rewrite(folder: Path, edit: Edit) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(K), f"1 tensors are missing: {K}"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 tensors belong to nothing: extra"),
        (lambda t: t.update({K: torch.zeros(16, 31)}), rf"{K}: shape \(16, 31\); the configuration says \(16, 32\)"),
        (lambda t: t.update({K: torch.zeros(16, 32, dtype=torch.int8)}), f"{K}: dtype I8; accepted: "),
    ],
)
def test_tensors_that_do_not_fit_are_named(llama: Path, edit: Edit, message: str) -> None:
    rewrite(llama, edit)
    with pytest.raises(ValueError, match=message):
        import_folder(llama)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_quick"}, "hidden_act: 'gelu_quick'; one of .*silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small'; a number is expected"),
        ({"hidden_size": None}, "hidden_size: missing; an integer"),
        ({"model_type": "lama"}, "model_type: 'lama' is not known; nearest: llama"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type: 'spiral'; accepted: default, linear"),
    ],
)
def test_values_that_nobody_knows_are_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    reconfigure(llama, **changes)
    with pytest.raises(ValueError, match=message):
        import_folder(llama)


def test_keys_that_nobody_reads_and_tensors_that_nobody_needs_are_reported(llama: Path) -> None:
    reconfigure(llama, attention_temperature=2.0)
    rewrite(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    got = import_folder(llama)
    assert got.unread == ("attention_temperature",)
    assert list(got.skipped) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path: Path) -> None:
    tiny.save("qwen3", tmp_path)
    copy = lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})  # noqa: E731
    rewrite(tmp_path, copy)
    assert import_folder(tmp_path).skipped == {"lm_head.weight": "tied to model.embed_tokens.weight"}
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1.0))
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        import_folder(tmp_path)
