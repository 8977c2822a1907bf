"""`assay import`: a GGUF file, a folder and a name on the hub become checkpoints that the other verbs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

from assay.cli.main import main
from assay.data.tokenizers import Tokenizer
from assay.engine.template import chat_template, encode
from assay.hub.load import import_folder
from assay.train.checkpoint import load_checkpoint
from tests.hub import tiny, write_gguf
from tests.hub.test_tokenizer import trained, values
from tests.model.hf import randomised

TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|begin|>"
SIZES = {**tiny.USUAL, "vocab_size": 604, "tie_word_embeddings": True, "rope_parameters": tiny.rope()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as a folder (`model`) and as a file (`model.gguf`), with its tokenizer."""
    home = tmp_path_factory.mktemp("sources")
    made: Any = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    made.save_pretrained(home / "model")
    words = trained("smollm")
    Tokenizer(words, {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}).save(home / "model")

    def tokenizer(writer: gguf.GGUFWriter) -> None:
        found = {k.removeprefix("tokenizer.ggml."): v for k, v in values(words).items() if k.startswith("tokenizer.")}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(found["tokens"])
        writer.add_token_types(found["token_type"])
        writer.add_token_merges(found["merges"])
        writer.add_eos_token_id(found["eos_token_id"])
        writer.add_chat_template(TEMPLATE)

    write_gguf.write(home / "model.gguf", made.config, load_file(home / "model" / "model.safetensors"), more=tokenizer)
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object], str]:
    """Exit status, the last line's object, what stands on stderr."""
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]) if status == 0 else {}, err


@pytest.mark.parametrize("name", ["model", "model.gguf"])
def test_both_forms_give_one_checkpoint(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ckpt"
    status, told, _ = run(capsys, "import", sources / name, "--out", out, "--json")
    assert status == 0
    assert told["family"] == "llama" and told["vocab"] == 600 and told["chat_template"] is True
    assert (told["unread"], told["skipped"], told["dtype"]) == ([], {}, "float32")
    model, words, spec = load_checkpoint(out)
    expected = import_folder(sources / "model")
    assert spec == expected.spec
    assert told["params"] == sum(p.numel() for p in expected.model.parameters())
    for parameter, value in model.named_parameters():
        assert torch.equal(value, expected.model.get_parameter(parameter))
    theirs = transformers.AutoTokenizer.from_pretrained(sources / "model")
    said = [{"role": "user", "content": "x = 12"}]
    ids = theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert list(encode(said, chat_template(words) or "", words)) == ids
    status, told, _ = run(capsys, "generate", out, "--prompt", "def", "--temperature", 0, "--max-new", 3, "--json")
    assert status == 0 and len(told["tokens"]) == 3  # type: ignore[arg-type]
    assert not list(tmp_path.glob(".*"))


def test_a_name_on_the_hub_is_read_from_its_cache_without_a_network(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "cache" / "models--tiny--llama"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(sources / "model", home / "blobs")
    for blob in (home / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(blob)
    status, told, _ = run(capsys, "import", "tiny/llama", "--out", tmp_path / "a", "--dtype", "bf16", "--json")
    assert status == 0 and told["dtype"] == "bfloat16"
    assert load_checkpoint(tmp_path / "a")[2] == import_folder(sources / "model").spec
    for name in ("tiny/other", "tiny/llama@v2"):
        status, _, error = run(capsys, "import", name, "--out", tmp_path / "b")
        assert status == 2
        assert f"error: {name}: no such file or folder; nor in the hub's cache" in error and "OFFLINE" in error


def test_what_cannot_be_imported_leaves_nothing_behind(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((sources / "model.gguf").read_bytes()[:-5])
    small = tmp_path / "small"
    shutil.copytree(sources / "model", small)
    (small / "tokenizer.json").unlink()
    full = tmp_path / "full"
    (full / "kept").mkdir(parents=True)
    refused = {
        (cut,): "cut.gguf: ",
        (small,): "no tokenizer.json; --tokenizer names another folder",
        (tmp_path / "none.gguf",): "none.gguf: no such file",
        (small, "--tokenizer", sources / "model", "--dtype", "int3"): "--dtype 'int3': accepted: f32, bf16",
    }
    for arguments, message in refused.items():
        status, _, error = run(capsys, "import", *arguments, "--out", tmp_path / "out")
        assert (status, message in error, "Traceback" in error) == (2, True, False), error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    status, _, error = run(capsys, "import", sources / "model", "--out", full)
    assert status == 2 and "is not an empty folder" in error and (full / "kept").is_dir()
    assert run(capsys, "import", small, "--tokenizer", sources / "model", "--out", tmp_path / "out", "--json")[0] == 0


def copied(sources: Path, out: Path, **changes: object) -> Path:
    """The folder with other values in its config.json."""
    shutil.copytree(sources / "model", out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def test_settings_for_replies_that_nobody_obeys_are_told(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older files have them in config.json; how to draw counts where transformers draws, and has a flag here."""
    folder = copied(sources, tmp_path / "in", num_beams=4, min_length=3, no_repeat_ngram_size=0)
    given = {"forced_eos_token_id": 2, "min_length": 5, "early_stopping": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(given))
    obeyed = {"num_beams": 4, "forced_eos_token_id": 2, "min_length": 5, "early_stopping": True}
    status, told, _ = run(capsys, "import", folder, "--out", tmp_path / "a", "--json")
    assert status == 0 and told["generation"] == obeyed
    (folder / "generation_config.json").write_text(json.dumps({**given, "do_sample": True}))
    assert main(["import", str(folder), "--out", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("generation setting that is not taken over: ")]
    assert len(said) == 6 and any("top_p: 0.9 (give --top-p)" in line for line in said)
    assert any("min_length: 5 (give --min-new N" in line for line in said)
    assert any("num_beams: 4 (give generate --beams)" in line for line in said)
    status, told, _ = run(capsys, "import", sources / "model", "--out", tmp_path / "c", "--json")
    assert status == 0 and told["generation"] == {}


@pytest.mark.parametrize(
    ("key", "said", "name"),
    [
        ("quantization_config", {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed"),
        ("quantization_config", {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}, "NVFP4"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ("quantization", {"bits": 4, "group_size": 64}, "quantization"),
        ("text_config", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
def test_quantised_folders_are_refused_by_name(
    key: str, said: object, name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(sources, tmp_path / "in", **{key: said})
    status, _, error = run(capsys, "import", folder, "--out", tmp_path / "out")
    assert status == 2 and name in error and "accepted: a folder with float weights" in error.replace("\n", " ")
    assert main(["parity", str(folder)]) == 2
    assert main(["bill", str(folder)]) == 0  # what it costs does not hang on how it was stored
