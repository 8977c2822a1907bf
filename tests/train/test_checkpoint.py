"""Checkpoints: what is written is read back, and damage is named by its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from assay.model.lm import LM, build
from assay.ops.step import rows_step
from assay.spec.load import digest, load_model
from assay.train.checkpoint import MODEL, WEIGHTS, load_checkpoint, read_weights, save_checkpoint
from assay.train.loop import train
from tests.train.small import data, model, recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(model(), recipe(tokens=128), folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_a_checkpoint_has_the_files_that_the_contract_names(trained: Path) -> None:
    names = {"model.yaml", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.yaml", "state"}
    assert names <= {path.name for path in trained.iterdir()}
    assert not list(trained.glob("**/*.part")) and len(list((trained / "state").iterdir())) == 1
    assert {oct(p.stat().st_mode & 0o777) for p in trained.glob("**/*.safetensors")} == {
        oct((trained / MODEL).stat().st_mode & 0o777)
    }
    assert transformers.PreTrainedTokenizerFast.from_pretrained(trained).encode("abc") == [97, 98, 99]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    for spec in (model(), model(head={"kind": "lm"}), shared()):
        made = LM(spec).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        save_checkpoint(tmp_path / digest(spec), made, data().tokenizer)
        loaded, tokenizer, again = load_checkpoint(tmp_path / digest(spec))
        assert digest(again) == digest(spec) and tokenizer.vocab_size == 256
        step = rows_step(torch.arange(10)[None])
        assert torch.equal(made(step).logits, loaded(step).logits)
        assert digest(load_model(tmp_path / digest(spec))) == digest(spec)


def shared():  # type: ignore[no-untyped-def]
    blocks = model().model_dump()["blocks"] | {"again": {"like": "blocks.0"}}
    return model(blocks=blocks, pattern=["b", "again"])


def test_weights_keep_the_dtype_they_were_saved_in(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, build(model()).to(torch.bfloat16), data().tokenizer)
    assert {p.dtype for p in load_checkpoint(tmp_path)[0].parameters()} == {torch.bfloat16}


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), "utf-8")

    return change


def cut(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(WEIGHTS, 0.5), r"model.safetensors: damaged"),
        (cut(WEIGHTS, 0.0), r"model.safetensors: damaged"),
        (cut("tokenizer.json", 0.5), r"tokenizer.json"),
        (cut("model.yaml", 0.9), r"model.yaml"),
        (cut("model.yaml", 0.0), r"model.yaml: empty"),
        (lambda f: (f / WEIGHTS).unlink(), "holds no weights: it has no model.safetensors"),
        (lambda f: (f / MODEL).unlink(), "not a checkpoint: it has no model.yaml"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (edit(MODEL, "format: 1", "format: 2"), "model.yaml: format 2; this assay reads 1: use a newer assay"),
        (edit(MODEL, "format: 1\n", ""), "model.yaml: format None"),
        (edit(MODEL, "d_model: 16", "d_model: 32"), r"model.safetensors: .* is \[256, 16\] float32; model.yaml says"),
        (edit(MODEL, "layers: 2", "layers: 3"), r"model.safetensors: lacks 'blocks.2"),
        (edit(MODEL, "vocab: 256", "vocab: 99"), r"tokenizer.json: 256 ids, the model has 99"),
        (tensors(lambda t: t.pop("embed.weight")), r"model.safetensors: lacks 'embed.weight'"),
        (tensors(lambda t: t.update(odd=torch.zeros(1))), r"model.safetensors: holds 'odd'"),
        (tensors(lambda t: t.update({"embed.weight": torch.zeros(256, 16).int()})), r"embed.weight is .* int32"),
    ],
)
def test_damage_is_one_clear_error(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def run_json(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = next(folder.glob("state/*/run.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("state/2/run.json", 0.5), "run.json: damaged: not JSON"),
        (cut("state/2/optimizer.safetensors", 0.9), "optimizer.safetensors: damaged"),
        (lambda f: shutil.rmtree(f / "state"), "run.json: missing; model.safetensors was saved at step 2"),
        (run_json(step=1), "does not describe step 2"),
        (run_json(metrics_bytes=10**9), "metrics.jsonl: .* bytes; its run was saved when it had 1000000000"),
        (run_json(loader={"stream": "x"}), "data state: taken with another corpus"),
        (tensors(lambda t: None), "names no step"),
    ],
)
def test_a_run_is_not_resumed_from_damaged_state(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=message):
        train(model(), recipe(tokens=128), copy, resume=True)


def test_weights_go_where_the_model_is(tmp_path: Path) -> None:
    """A run is resumed into a model that is on its device already."""
    lm = build(model())
    save_checkpoint(tmp_path, lm, data().tokenizer)
    read_weights(tmp_path, lm.to("meta"))
    assert {p.device.type for p in lm.parameters()} == {"meta"}
