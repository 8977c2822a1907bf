"""`assay train CKPT --from CKPT`: what was imported is trained further, in its own tokenizer's ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml

from assay.cli.main import main
from assay.data.loader import Loader
from assay.data.tokenizers import Tokenizer
from assay.measure import machine
from assay.train.checkpoint import load_checkpoint
from assay.train.evaluate import step_of
from assay.train.loop import dataset
from assay.train.recipe import load_recipe
from tests.hub import tiny
from tests.hub.test_tokenizer import trained
from tests.model.hf import randomised
from tests.train.small import RECIPE

SIZES = {**tiny.USUAL, "vocab_size": 604, "tie_word_embeddings": True, "rope_parameters": tiny.rope()}


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(machine, "matmul_flop_s", lambda dtype, device: 1e11)  # measured elsewhere, and slow
    made = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    made.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    Tokenizer(trained("smollm"), {"eos_token": "<|im_end|>"}).save(tmp_path / "hf")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")]) == 0
    capsys.readouterr()
    return tmp_path


def test_the_first_loss_is_the_imported_models(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, out = imported / "ckpt", imported / "run"
    command = ["train", str(start), "--recipe", str(imported / "recipe.yaml"), "recipe.tokens=128"]
    assert main([*command, "--from", str(start), "--out", str(out)]) == 0
    assert f"begins with the weights of {start}, its own tokenizer, and a new optimiser" in capsys.readouterr().err
    recipe = load_recipe(out)
    batch = next(Loader(dataset(recipe).train, recipe.batch.rows, recipe.batch.length, recipe.seed))
    model, words, _ = load_checkpoint(start)
    assert next(model.parameters()).dtype == torch.bfloat16 and words.vocab_size > 256
    with torch.no_grad():
        logits = model.float()(step_of(batch)).logits
    expected = F.cross_entropy(logits[batch.targets >= 0], batch.targets[batch.targets >= 0])
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss_nats"] == pytest.approx(float(expected), rel=1e-5)
    after, same, _ = load_checkpoint(out)
    assert same.digest == words.digest and next(after.parameters()).dtype == torch.float32
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(after.parameters(), model.parameters()))
    assert 1e-4 < moved < 0.1  # two steps away from where it began
    assert main(["train", str(start), "--recipe", str(out), "--resume", "--out", str(out)]) == 0


def test_weights_of_another_shape_are_refused(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(imported / "ckpt"), "--recipe", str(imported / "recipe.yaml"), "--out", str(imported / "r")]
    assert main([*command, "--from", str(imported / "ckpt"), "model.layers=1"]) == 2
    assert "names differ" in capsys.readouterr().err
    assert main([*command, "--from", str(imported / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
