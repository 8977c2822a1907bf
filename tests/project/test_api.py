"""The package from Python, and that importing it costs nothing."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import assay
from assay.data.corpora import CorpusSpec, open_corpus
from assay.data.tokenizers import TokenizerSpec, build_tokenizer
from assay.ops.step import rows_step
from tests.hub import tiny
from tests.project.source import ROOT


def test_importing_assay_imports_nothing_heavy() -> None:
    script = "import assay, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert not set(done.stdout.split()) & {"torch", "numpy", "pydantic", "yaml", "assay.api"}


def test_spec_is_a_package_and_a_function() -> None:
    from assay.spec.model import ModelSpec

    shipped = yaml.safe_load((ROOT / "assay/shelf/models/gpt-11m.yaml").read_text())
    made = assay.spec("gpt-11m", layers=3, **{"blocks.*.mixer.heads": 2})
    assert isinstance(made, ModelSpec)
    assert (made.d_model, made.layers) == (shipped["d_model"], 3)
    assert all(block.mixer.heads == 2 for block in made.blocks.values())
    with pytest.raises(ValueError, match="gpt-11m"):
        assay.spec("gpt-11m", layer=3)


def test_a_bill_counts_what_is_built() -> None:
    from assay.model.lm import LM

    made = assay.spec("gpt-11m", layers=2)
    counted = sum(p.numel() for p in LM(made).parameters())
    assert assay.bill(made).params["total"] == counted
    assert assay.bill("gpt-11m", context=64).state_bytes * 2 == assay.bill("gpt-11m", context=128).state_bytes
    with pytest.raises(TypeError, match="contexts"):
        assay.bill("gpt-11m", contexts=64)


def test_load_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    from assay.model.lm import build
    from assay.train.checkpoint import save_checkpoint

    model = build(assay.spec("gpt-11m", layers=1), seed=3).eval()
    corpus = open_corpus(CorpusSpec(kind="generated"))
    save_checkpoint(tmp_path, model, build_tokenizer(TokenizerSpec(kind="byte"), corpus))
    loaded, tokenizer = assay.load(tmp_path)
    step = rows_step(torch.tensor(tokenizer.encode("assay"))[None])
    logits = model(step).logits
    assert logits.isfinite().all() and torch.equal(loaded(step).logits, logits)


def test_a_folder_of_hugging_face_is_billed_and_loaded(tmp_path: Path) -> None:
    made = tiny.save("llama", tmp_path)
    count = sum(p.numel() for p in made.parameters())
    assert assay.bill(tmp_path).params["total"] == assay.bill(tmp_path / "config.json").params["total"] == count
    words = build_tokenizer(TokenizerSpec(kind="char"), open_corpus(CorpusSpec(kind="generated")))
    words.save(tmp_path)
    loaded, tokenizer = assay.load(tmp_path)
    ids = torch.tensor(tokenizer.encode("a"))[None]
    assert tokenizer.digest == words.digest
    with torch.no_grad():
        torch.testing.assert_close(loaded(rows_step(ids)).logits, made(ids).logits[0], rtol=0, atol=1e-4)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = assay.nothing  # type: ignore[attr-defined]


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(assay) == (0, 2)
