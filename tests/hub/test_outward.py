"""Every family that is read is written too: from Hugging Face's own files in and out again, and transformers loads what
was written and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from assay.data.tokenizers import Tokenizer
from assay.data.vocabularies import from_bytes
from assay.hub import live
from assay.hub.config import Config
from assay.hub.export import export_hf
from assay.hub.express import as_family
from assay.hub.families import t5
from assay.hub.load import Imported, import_folder, matches
from assay.model.lm import build
from assay.ops.step import rows_step
from assay.spec.load import digest, load_model, validate
from assay.spec.model import ModelSpec
from tests.hub import encoders, test_recurrent_decayed, test_recurrent_elementwise
from tests.hub.test_hybrids import jamba, lfm2, nemotron_h, nemotron_h_biased
from tests.hub.test_latent import v3, v3_plain, v32
from tests.hub.test_mixtures import gemma4, gemma4_mixture, glm4_moe, gpt_oss, llama4
from tests.hub.test_recurrent_decayed import mamba2, minimax, windowed
from tests.hub.test_recurrent_delta import kimi_linear, kimi_queries, qwen3_next
from tests.model.hf import ids, randomised

MAKERS = (
    *(jamba, lfm2, nemotron_h, nemotron_h_biased, v3, v3_plain, v32, gemma4, gemma4_mixture, glm4_moe, gpt_oss),
    *(llama4, mamba2, minimax, windowed, kimi_linear, kimi_queries, qwen3_next),
)

VARIANTS: tuple[str, ...] = ("windowed", "nemotron_h_biased", "kimi_queries", "v3_plain", "mamba-auto", "rwkv-rescaled")
VARIANTS += ("bert-pretraining", "roberta-classifier", "xlm-roberta", "recurrent_gemma-bias", "modernbert-local")
FIRST = dict.fromkeys(("roberta-classifier", "xlm-roberta"), "bert")
"""RoBERTa counts positions from another row, which is all that is its own: these are BERTs, and BERT is asked first."""


def drawn(make: Callable[[], tuple[Any, Any]], folder: Path) -> None:
    randomised(made := make()[0], 3)
    made.save_pretrained(folder)


def by_name(name: str, folder: Path) -> None:
    config, model, values = test_recurrent_elementwise.MADE[name]
    drawn(lambda: (model(config(**values)), None), folder)


def relu(folder: Path) -> None:
    """A RoBERTa whose head has GELU all the same, which no BERT has."""
    drawn(lambda: (hf.RobertaForMaskedLM(hf.RobertaConfig(**encoders.ROBERTA | {"hidden_act": "relu"})), None), folder)


def endless(folder: Path) -> None:
    """A Mamba-2 whose time steps nothing bounds, for which JSON has no number."""
    config = hf.Mamba2Config(**test_recurrent_decayed.SIZES, **test_recurrent_decayed.STATES, pad_token_id=0)
    drawn(lambda: (hf.Mamba2ForCausalLM(config), None), folder)


SAVE: dict[str, Callable[[Path], Any]] = {make.__name__: partial(drawn, make) for make in MAKERS}
SAVE |= {name: partial(by_name, name) for name in test_recurrent_elementwise.MADE}
SAVE |= {name: partial(encoders.save, name) for name in encoders.MADE}
SAVE |= {"roberta": relu, "mamba2-endless": endless}


def said(model: Any, form: str) -> torch.Tensor:
    """Of the class with this head: logits, the pooled output, or the features of a model without either."""
    x = ids(2, 14).clamp(min=2)
    more: dict[str, Any] = {"decoder": {"use_cache": False}, "both": {"decoder_input_ids": x[:, :9]}, "encoder": {}}
    out = model.eval()(input_ids=x, **more[form])
    found: torch.Tensor = next(out[key] for key in ("logits", "pooler_output", "last_hidden_state") if key in out)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in VARIANTS else n for n in SAVE])
def test_what_goes_out_is_what_came_in(name: str, tmp_path: Path) -> None:
    SAVE[name](tmp_path / "in")
    got = import_folder(tmp_path / "in")
    done = export_hf(got.model, Tokenizer(from_bytes(), starts=(2,)), tmp_path / "out")
    assert done.family == FIRST.get(name, got.family.__name__.rpartition(".")[2]), done.why_not
    auto = getattr(hf, live.AUTO[live.task(got.spec)])
    first = auto.from_pretrained(tmp_path / "in", attn_implementation="eager")
    again, report = auto.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not report["unexpected_keys"] and all(follows(key, got) for key in report["missing_keys"])
    assert f"import {live.AUTO[live.task(got.spec)]}," in (tmp_path / "out" / "README.md").read_text()
    form = live.form(got.spec)
    mine, theirs = said(again, form), said(first, form)
    share = 1e-4 if name == "rwkv-rescaled" else 1e-5  # halving the stream moves what the norms' epsilon does
    assert float((mine - theirs).abs().max()) <= share * float(theirs.abs().max())
    back = import_folder(tmp_path / "out")
    assert (digest(back.spec), back.unread) == (digest(got.spec), ())


def follows(key: str, got: Imported) -> bool:
    """Whether a tensor that is missing follows from the configuration, or nothing here reads it."""
    skip = got.family.skip(got.spec) if hasattr(got.family, "skip") else got.family.SKIP
    return any(matches(pattern, key) for pattern in skip)


def test_two_tables_do_not_become_one() -> None:
    """Layers that read different tables of relative positions, alike but for their numbers, are no T5's."""
    tree = t5.spec(Config(hf.T5Config(**encoders.T5).to_dict()))
    assert as_family(validate(ModelSpec, tree, "here"), "t5").name == "t5"
    block = tree["blocks"]["block"]
    own = json.loads(json.dumps(block).replace('"main"', '"other"'))
    tables = {**tree["positions"], "other": tree["positions"]["main"]}
    changed = {**tree, "positions": tables, "blocks": {"a": block, "b": own}, "pattern": ("a", "b")}
    with pytest.raises(ValueError, match=r"positions\.main\.weight: a table of its own; one for all layers"):
        as_family(validate(ModelSpec, changed, "here"), "t5")


@torch.no_grad()
@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "kimi_linear"])
def test_a_shipped_hybrid_is_its_namesake(family: str, tmp_path: Path) -> None:
    """The lab's own spelling leaves sizes to the parts; transformers computes the same as the model."""
    own = {"head.tie": False} if family == "kimi_linear" else {}  # transformers does not tie this one
    model: Any = build(load_model(f"lab-64-{family.replace('_', '-')}", own))
    randomised(model, 3)
    assert export_hf(model, Tokenizer(from_bytes()), tmp_path / "out").family == family
    loader: Any = hf.AutoModelForCausalLM
    theirs, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    x = ids(2, 14)
    mine, their = model(rows_step(x)).logits.unflatten(0, (2, 14)), theirs.eval()(x, use_cache=False).logits
    assert float((mine - their).abs().max()) <= 1e-5 * float(mine.abs().max())
