"""Encoders and encoder-decoders, in both dialects of their configuration, compute what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.cache import Size
from assay.engine.runner import Runner, right_padded
from assay.hub.load import import_folder
from assay.model.lm import LM
from assay.ops.step import Step, rows_step
from tests.hub import encoders
from tests.model.hf import VOCAB

LISTEN = frozenset({"*.in", "*final"})
IDS = torch.randint(2, VOCAB, (2, 17), generator=torch.Generator().manual_seed(3))
PREFIX = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
Edit = Callable[[dict[str, Any]], None]


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    assert ours.shape == theirs.shape, what
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= 1e-4, f"{what}: {error:.1e}"


@torch.no_grad()
def ours(model: LM, step: Step) -> dict[str, Tensor]:
    out = model(step)
    assert out.logits is not None
    return {**out.taps, "logits": out.logits}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, encoders.save(name, folder)
        return made[name]

    return get


DIALECTS = [(name, "written") for name in encoders.MADE] + [(name, "older") for name in sorted(encoders.OLDER)]


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_every_layer(name: str, dialect: str, saved: Any) -> None:
    folder, theirs = saved(name)
    found = import_folder(folder, encoders.older(folder, name) if dialect == "older" else None)
    assert found.unread == ()
    two = name in encoders.TWO_SIDED
    more = {"encode": rows_step(IDS, listen=LISTEN)} if two else {}
    made = ours(found.model, rows_step(PREFIX if two else IDS, listen=LISTEN, **more))
    expected = encoders.outputs(theirs, IDS, **({"decoder_input_ids": PREFIX} if two else {}))
    assert two == ("encoder.final" in expected) and len(expected) >= found.spec.layers + 1
    for what, value in expected.items():
        close(made[what], value, what)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "bert-classifier", "modernbert-classifier"])
def test_padding_is_seen_by_nobody(name: str, saved: Any) -> None:
    """A row of 17 beside a row of 6, whose padding transformers masks."""
    folder, theirs = saved(name)
    model, spec = import_folder(folder).model, theirs.config
    keep = torch.ones_like(IDS)
    keep[1, 6:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=torch.where(keep > 0, IDS, spec.pad_token_id), attention_mask=keep).logits
        step = right_padded([IDS[0].tolist(), IDS[1, :6].tolist()], [0, 0], [17, 6], IDS.device).with_(emit=None)
        made = model(step).logits
    whole = "classifier" in name
    close(made if whole else made[step.seq >= 0], expected if whole else expected[keep > 0], name)


def test_segments(saved: Any) -> None:
    folder, theirs = saved("bert")
    types = (torch.arange(17) > 5).long().expand(2, 17)
    step = rows_step(IDS)
    step = step.with_(inputs={**step.inputs, "types": types.reshape(-1)})
    with torch.no_grad():
        expected, plain = (theirs(input_ids=IDS, token_type_ids=t).logits.flatten(0, 1) for t in (types, None))
        made = import_folder(folder).model(step).logits
    close(made, expected, "segments")
    assert float((made - plain).abs().max()) > 0.1


@pytest.mark.parametrize("name", encoders.TWO_SIDED)
def test_greedy_with_a_source(name: str, saved: Any) -> None:
    """The engine's cached continuation, prefilled in pieces beside a source of another length; without any cache."""
    folder, theirs = saved(name)
    sources = [IDS[0].tolist(), IDS[1, :6].tolist()]
    runner = Runner(import_folder(folder).model, Size(2, 30, 4, 17))
    slots = [runner.open(16, source) for source in sources]
    logits, said = [runner.feed(slots, PREFIX.tolist())], PREFIX
    for _ in range(5):
        said = torch.cat([said, logits[-1].argmax(-1, keepdim=True)], 1)
        logits.append(runner.feed(slots, said[:, -1:].tolist()))
    for row, source in enumerate(sources):
        with torch.no_grad():
            whole = theirs(input_ids=torch.tensor([source]), decoder_input_ids=said[row : row + 1]).logits[0, -6:]
        close(torch.stack(logits)[:, row], whole, f"row {row}")


def test_files_of_other_shapes(saved: Any, tmp_path: Path) -> None:
    """Without the prefix of the class, with copies of tied tensors, T5's table under its other name, and the norms of
    BERT under TensorFlow's names, as bert-base-uncased has them."""
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name, change, dropped in (
        ("bert-base", {}, "pooler.dense.weight"),
        ("bert", older, None),
        ("bert-base", older, None),
        ("roberta-classifier", older, None),
        ("t5", {"shared.weight": "encoder.embed_tokens.weight"}, None),
        ("bart", {"model.shared.weight": "model.encoder.embed_tokens.weight"}, None),
    ):
        folder, _ = saved(name)
        there, here = load_file(folder / "model.safetensors"), tmp_path / f"{name}-{len(change)}"
        here.mkdir()
        for old, new in change.items():
            renamed = {k.removesuffix(old) + new if k.endswith(old) else k: v for k, v in there.items()}
            assert renamed.keys() != there.keys()
            there = renamed
        there.pop(dropped or "", None)
        if name == "bart":
            there["lm_head.weight"] = there["model.encoder.embed_tokens.weight"].clone()
        save_file(there, here / "model.safetensors")
        (here / "config.json").write_text((folder / "config.json").read_text())
        a, b = (dict(import_folder(f).model.named_parameters()) for f in (folder, here))
        if dropped is not None:  # a pooler of which half is there is none
            assert a.pop("head.dense.weight").shape == (24, 24) and a.pop("head.dense.bias").shape == (24,)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        ("bert", lambda c: c.update(is_decoder=True), "is_decoder: True; accepted: false"),
        ("bert", lambda c: c.update(position_embedding_type="relative_key"), "position_embedding_type: 'relative_key'"),
        ("bert-classifier", lambda c: c.update(architectures=["BertForTokenClassification"]), "ForSequenceClass"),
        ("roberta", lambda c: c.update(pad_token_id=0), "pad_token_id: 0; accepted: 1"),
        ("modernbert", lambda c: c.update(classifier_pooling="max"), "classifier_pooling: 'max'; one of cls, mean"),
        ("bart", lambda c: c.update(normalize_before=True), "normalize_before: True; accepted: false"),
        ("t5", lambda c: c.update(feed_forward_proj="gated-tanh"), "feed_forward_proj: 'gated-tanh'; one of relu"),
    ],
)
def test_what_is_not_honoured_is_refused(name: str, edit: Edit, told: str, saved: Any, tmp_path: Path) -> None:
    folder, _ = saved(name)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        import_folder(folder, tmp_path / "config.json")
