"""`assay parity` of encoders, classifiers and encoder-decoders: with transformers, and with a reference file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.cli.main import main
from assay.hub.live import ENCODER, open_live
from assay.hub.load import import_folder
from assay.measure.isolate import alone, sides
from assay.measure.parity import compare, first_step, step_of
from tests.hub import encoders
from tests.hub.test_encoders import IDS
from tests.measure.test_parity import Case, Edit, Weights, spoiled


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """An import with transformers' outputs, made once."""
    made: dict[str, Case] = {}

    def of(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            encoders.save(name, folder)
            got = import_folder(folder)
            live = open_live(folder, got.family, got.spec)
            made[name] = Case(folder, got, live, live.reference(IDS))
        return made[name]

    return of


@torch.no_grad()
def own_words(model: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same quantities by transformers' own means: its list of hidden states, whose last is after the final norm."""
    two = "decoder_input_ids" in found
    names = ("input_ids", "decoder_input_ids") if two else ("input_ids",)
    out = model(**{name: found[name] for name in names}, output_hidden_states=True)
    stacks = {"enc.": out.encoder_hidden_states, "": out.decoder_hidden_states} if two else {"": out.hidden_states}
    told = {f"{named}hidden.{i}": h for named, hidden in stacks.items() for i, h in enumerate(hidden[:-1])}
    told |= {f"{named}final": hidden[-1] for named, hidden in stacks.items()}
    padded = {name: found[f"rightpad.{name}"] for name in ("attention_mask", *names)}
    last = model(**padded)
    told["rightpad.logits"] = next(last[k] for k in ("logits", "pooler_output", "last_hidden_state") if k in last)
    if two:
        said = torch.cat([found["decoder_input_ids"][:, :1], found["greedy_ids"][:, :-1]], 1)
        told["greedy_ids"] = model(input_ids=found["input_ids"], decoder_input_ids=said).logits.argmax(-1)
    return told | ({"logits": out.logits} if "logits" in out else {})


@pytest.mark.parametrize("name", ["bert", "bert-base", "bert-classifier", "roberta", "modernbert", "bart", "t5"])
def test_everything_agrees_with_transformers(name: str, case: Callable[[str], Case]) -> None:
    """What hooks record is what transformers itself tells; ours agrees, also at every step inside every block."""
    c = case(name)
    for what, value in own_words(c.live.model, c.reference).items():
        torch.testing.assert_close(c.reference[what], value, rtol=0, atol=1e-5, msg=lambda m, w=what: f"{w}: {m}")
    report = compare(c.got, c.reference)
    two = name in encoders.TWO_SIDED
    assert (report.match, report.absent) == (True, ())
    assert ({"enc.final", "greedy_ids"} <= {row.quantity for row in report.rows}) == two
    assert c.live.model.config.pad_token_id not in c.reference["input_ids"]
    for side in sides(c.got.model, step_of(c.reference), c.reference):
        for layer in range(side.model.spec.layers):
            ours = alone(side.model, side.step, side.reference, layer).inside
            theirs = c.live.inside(layer, IDS, ENCODER if side.named else "")
            wanted = {f"mixer.{x}" for x in ("q", "k", "scores", "mix")} | {"mixer", "ffn"}
            wanted |= {w.replace("mixer", "mixer2") for w in wanted} if two and not side.named else set()
            assert wanted <= ours.keys() & theirs.keys()
            assert first_step(ours, theirs) is None


def transposed(name: str) -> Edit:
    def edit(weights: Weights) -> Weights:
        return {name: weights[name].T.contiguous()}

    return edit


FIRST, CROSS, LAST = (f"blocks.block.stages.{i}.branches.0" for i in range(3))
PLANTED: list[tuple[str, dict[str, Any], Edit | None, tuple[int | None, str, str | None]]] = [
    ("bert", {"head.act": "relu"}, None, (None, "logits", "head.act is relu here; gelu_tanh fits")),
    (
        "t5",
        {f"encoder.{CROSS}.ffn.act": "silu"},
        None,
        (0, "enc.ffn", f"in the encoder, {CROSS}.ffn.act is silu here; relu fits"),
    ),
    ("t5", {f"{LAST}.pre.eps": 0.2}, None, (0, "ffn_norm", f"{LAST}.pre.eps is 0.2 here; 0.002")),
    (
        "bart",
        {f"{CROSS}.mixer.scale": 0.7},
        None,
        (0, "mixer2.scores", f"{CROSS}.mixer.scale is 0.7 here; 0.408248 fits"),
    ),
    (
        "bart",
        {},
        transposed("encoder.blocks.1.mixer.out.weight"),
        (1, "enc.mixer", "in the encoder, blocks.1.mixer.out.weight is transposed"),
    ),
    ("modernbert", {"blocks.sliding.stages.0.branches.0.mixer.sees.band": [3, 2]}, None, (1, "mixer.scores", None)),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "changes", "edit", "wanted"), PLANTED, ids=[f"{p[0]}-{p[3][1]}" for p in PLANTED])
def test_a_planted_defect_is_found_and_named(
    name: str,
    changes: dict[str, Any],
    edit: Edit | None,
    wanted: tuple[int | None, str, str | None],
    case: Callable[[str], Case],
) -> None:
    c = case(name)
    bad, inside = spoiled(c.got, changes, edit), lambda layer, side: c.live.inside(layer, IDS, side)
    report = compare(bad, c.reference, {"head_dim": 6.0}, inside)
    first = report.first_divergence
    assert first is not None and not report.match
    layer, step, cause = wanted
    assert (first.layer, first.step, first.cause is None) == (layer, step, cause is None)
    assert str(first.cause).startswith(str(cause))  # a scanned number is told to three digits


def run(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    status = main(["parity", str(folder), *more, "--json"])
    told = capsys.readouterr()
    assert status < 2, told.err
    return status, json.loads(told.out.splitlines()[-1])


def test_the_verb(case: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With transformers; and with a file and a configuration with another activation, in both stacks."""
    c = case("t5")
    status, told = run(c.folder, capsys, "--tokens", "12")
    assert (status, told["match"], told["absent"]) == (0, True, [])
    save_file({k: v.contiguous().clone() for k, v in c.reference.items()}, tmp_path / "reference.safetensors")
    wrong = {**json.loads((c.folder / "config.json").read_text()), "feed_forward_proj": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    more = ("--config", str(tmp_path / "config.json"), "--reference", str(tmp_path / "reference.safetensors"))
    status, told = run(c.folder, capsys, *more)
    first = told["first_divergence"]
    assert (status, first["layer"], first["step"]) == (1, 0, "enc.ffn")
    assert first["cause"] == f"in the encoder, {CROSS}.ffn.act is gelu here; relu fits"


def test_a_reference_without_the_decoders_tokens(
    case: Callable[[str], Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = case("bart")
    found = {k: v.contiguous().clone() for k, v in c.reference.items() if k != "decoder_input_ids"}
    save_file(found, tmp_path / "reference.safetensors")
    assert main(["parity", str(c.folder), "--reference", str(tmp_path / "reference.safetensors")]) == 2
    assert "decoder_input_ids: missing; a reference has input_ids, decoder_input_ids" in capsys.readouterr().err
