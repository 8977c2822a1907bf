"""Parity finds what is planted: the layer, the step and the cause; and it reads its input strictly."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.cli.main import main
from assay.data.settings import read_object
from assay.hub.live import Live, open_live
from assay.hub.load import Imported, import_folder, put
from assay.measure.isolate import alone, places, relative
from assay.measure.parity import Divergence, Report, compare, first_step
from assay.measure.reference import numbers_of, read_reference, sample
from assay.model.lm import LM
from assay.ops.step import rows_step
from assay.spec.load import change
from tests.hub import tiny
from tests.model.hf import ids

Weights = dict[str, Tensor]
Edit = Callable[[Weights], Weights]


@dataclasses.dataclass
class Case:
    folder: Path
    got: Imported
    live: Live
    reference: dict[str, Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A family's import with transformers' outputs, made once."""
    made: dict[str, Case] = {}

    def of(name: str) -> Case:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = tiny.save(name, folder)
            got = import_folder(folder)
            live = open_live(folder, got.family, got.spec)
            plain = tiny.reference(theirs, ids(2, 14))
            last = live.reference(ids(2, 14))[f"hidden.{got.spec.layers}"]
            made[name] = Case(folder, got, live, {**plain, f"hidden.{got.spec.layers}": last})
        return made[name]

    return of


def spoiled(got: Imported, changes: Mapping[str, Any], edit: Edit | None = None) -> Imported:
    """The import with a defect in its spec or its weights."""
    spec = change(got.spec, changes)
    with torch.device("meta"):
        model = LM(spec)
    own = {name: p.detach() for name, p in got.model.named_parameters()}
    own |= edit(own) if edit is not None else {}
    for name, _ in list(model.named_parameters()):
        put(model, name, own[name])
    return dataclasses.replace(got, model=model.eval(), spec=spec)


def asked(case: Case, bad: Imported, live: bool) -> Divergence:
    """The first divergence, with transformers at hand or with the file's tensors alone."""
    x = case.reference["input_ids"]
    numbers = numbers_of(read_object(case.folder / "config.json")) if live else {}
    report = compare(
        bad, case.reference, numbers, (lambda layer, side: case.live.inside(layer, x, side)) if live else None
    )
    assert not report.match
    assert report.first_divergence is not None
    return report.first_divergence


def neighbours(weights: Weights) -> Weights:
    """Queries and keys as if the file had RoPE's pairs as neighbours: rows 0, 2, 4, 6, 1, 3, 5, 7 of each head of 8."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    names = [n for n in weights if ".mixer.q." in n or ".mixer.k." in n]
    return {n: torch.cat([head[order] for head in weights[n].split(8)]) for n in names}


def noisy(weights: Weights) -> Weights:
    """Queries that no single change brings back."""
    w = weights["blocks.0.mixer.q.weight"]
    return {"blocks.0.mixer.q.weight": w + torch.randn(w.shape, generator=torch.Generator().manual_seed(0))}


def transposed(weights: Weights) -> Weights:
    return {"blocks.1.mixer.out.weight": weights["blocks.1.mixer.out.weight"].T.contiguous()}


def exchanged(weights: Weights) -> Weights:
    return {"blocks.0.ffn.gate": weights["blocks.0.ffn.up"], "blocks.0.ffn.up": weights["blocks.0.ffn.gate"]}


@dataclasses.dataclass(frozen=True)
class Defect:
    """What is planted, and what must be said of it. file: the step where only the file's tensors are known; null where
    that is not tried. cause: null where none of the trials helps."""

    family: str
    layer: int | None
    live: str
    cause: str | None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None
    file: str | None = None


def field(
    family: str, layer: int | None, live: str, path: str, wrong: Any, told: str, file: str | None = None
) -> Defect:
    return Defect(family, layer, live, f"{path} is {told} fits", {path: wrong}, None, file)


LAYOUT = "RoPE's layout: the file pairs halves, and they were read as neighbours"
DEFECTS = [
    field("llama", 0, "mixer_norm", "blocks.block.norm.kind.eps", 1e-6, "1e-06 here; 0.002", "norm"),
    field("llama", None, "final", "final_norm.eps", 0.1, "0.1 here; 0.002"),
    Defect("llama", 0, "mixer.q", LAYOUT, edit=neighbours),
    Defect("llama", 1, "mixer", "blocks.1.mixer.out.weight is transposed", edit=transposed, file="mixer.out"),
    Defect("llama", 0, "mixer.q", None, edit=noisy),
    Defect(
        "llama",
        0,
        "mixer_norm",
        f"{LAYOUT}; and blocks.block.norm.kind.eps is 1e-06 here; 0.002 fits",
        {"blocks.block.norm.kind.eps": 1e-6},
        neighbours,
    ),
    field("granite", None, "in", "embed.scale", 1.0, "1 here; 6"),
    field("granite", None, "logits", "head.scale", 1.0, "1 here; 0.5"),
    field("granite", 0, "mixer.scores", "blocks.block.mixer.scores.scale", None, "absent here; 0.1", "mixer.scores"),
    field("granite", 0, "ffn_norm", "blocks.block.scale", 1.0, "1 here; 0.4"),
    field("gemma2", 1, "mixer_norm", "blocks.full.norm.kind.weight", "one", "one here; plus_one"),
    field("gemma2", 1, "ffn", "blocks.full.ffn.act", "silu", "silu here; gelu_tanh"),
    field("gemma2", 0, "mixer.scores", "blocks.sliding.mixer.sees.window", 6, "6 here; 5", "mixer.scores"),
    field("gemma2", None, "logits", "head.softcap", None, "absent here; 4"),
    Defect("mixtral", 0, "ffn", "blocks.0.ffn.gate and blocks.0.ffn.up are exchanged", edit=exchanged),
    field("mixtral", 0, "ffn", "blocks.block.ffn.router.renormalise", False, "false here; true"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("planted", DEFECTS, ids=[f"{d.family}-{d.cause}" for d in DEFECTS])
def test_a_planted_defect_is_found_and_named(case: Callable[[str], Case], planted: Defect) -> None:
    c = case(planted.family)
    bad = spoiled(c.got, planted.changes, planted.edit)
    for live, step in ((False, planted.file), (True, planted.live)):
        if step is None:
            continue
        found = asked(c, bad, live)
        assert (found.layer, found.step, found.cause) == (planted.layer, step, planted.cause)
        assert found.max_rel_diff > 1e-5


def test_each_place_alone_is_blind_to_the_places_before_it(case: Callable[[str], Case]) -> None:
    """A defect in layer 1 only: layer 0 and everything after layer 1 agree when they are fed by the reference."""
    c = case("llama")
    bad = spoiled(c.got, {}, transposed)
    made = alone(bad.model, rows_step(c.reference["input_ids"]), c.reference).outputs
    errors = {p.name: relative(made[p.name], c.reference[p.wanted].flatten(0, 1)) for p in places(bad.spec)}
    assert errors.pop("blocks.1") > 0.1
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("quantity", "told"), [("greedy_logits", "the cache"), ("leftpad.logits", "unequal length"), ("final", None)]
)
def test_where_no_place_differs_alone_what_differs_is_said(
    case: Callable[[str], Case], quantity: str, told: str | None
) -> None:
    """The cache or the padding alone; and a reference that has no hidden states to look at."""
    c = case("llama")
    wrong = {**c.reference, quantity: c.reference[quantity] + 1.0}
    wrong = wrong if told is not None else {k: wrong[k] for k in ("input_ids", "logits", "final")}
    first = compare(c.got, wrong).first_divergence
    assert first is not None
    assert (first.layer, first.step) == (None, quantity if told is not None else "logits")
    assert told is None or told in str(first.cause)


def test_another_token_counts_only_where_the_reference_is_sure(case: Callable[[str], Case]) -> None:
    c = case("llama")
    said, logits = c.reference["greedy_ids"].clone(), c.reference["greedy_logits"].clone()
    said[0, -1] = (said[0, -1] + 1) % tiny.VOCAB
    rows = {r.quantity: r for r in compare(c.got, {**c.reference, "greedy_ids": said}).rows}
    assert rows["greedy_ids"].max_rel_diff == pytest.approx(1 / said.numel())
    logits[0, -1, said[0, -1]] = logits[0, -1].max()  # a tie: either token is right
    rows = {r.quantity: r for r in compare(c.got, {**c.reference, "greedy_ids": said, "greedy_logits": logits}).rows}
    assert rows["greedy_ids"].match


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    status = main(["parity", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb_with_transformers(case: Callable[[str], Case], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, case("llama").folder, "--json", "--tokens", 12)
    found = json.loads(out.splitlines()[-1])
    assert (status, found["match"], found["first_divergence"]) == (0, True, None)
    assert 0 < found["max_rel_diff"] < 1e-5
    assert {row["quantity"] for row in found["rows"]} >= {"logits", "hidden.2", "leftpad.logits", "greedy_ids"}
    assert (found["unread"], found["skipped"]) == ([], {})


def test_the_verb_with_a_file_that_differs(
    case: Callable[[str], Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A configuration with another eps and a key nobody reads: exit 1, the cause, and every line fits 80 columns."""
    c = case("llama")
    save_file({k: v.contiguous() for k, v in c.reference.items()}, tmp_path / "reference.safetensors")
    wrong = {**read_object(c.folder / "config.json"), "rms_norm_eps": 1e-6, "odd": 1}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    told = ("--config", tmp_path / "config.json", "--reference", tmp_path / "reference.safetensors")
    status, out, _ = run(capsys, c.folder, *told, "--json")
    *lines, last = out.splitlines()
    assert status == 1
    assert "configuration key that nothing reads: odd" in lines
    assert "first difference: layer 0, step norm" in out
    assert "likely cause: blocks.block.norm.kind.eps is 1e-06 here; 0.002 fits" in lines
    assert max(map(len, lines)) <= 80
    found = json.loads(last)
    assert (found["match"], found["unread"]) == (False, ["odd"])
    assert found["first_divergence"].keys() == {"layer", "step", "max_rel_diff", "cause"}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logits": torch.zeros(2, 14, 61)}, "input_ids: missing"),
        ({"input_ids": torch.zeros(2, 14, dtype=torch.long)}, "logits: missing"),
        ({"input_ids": torch.zeros(2, 14), "logits": torch.zeros(2, 14, 61)}, "input_ids: torch.float32"),
        (
            {"input_ids": torch.full((2, 14), 61), "logits": torch.zeros(2, 14, 61)},
            "ids 61 to 61; the model has 0 to 60",
        ),
        (
            {"input_ids": torch.ones(2, 14).long(), "logits": torch.zeros(2, 13, 61)},
            r"logits: shape \(2, 13, 61\); \(2, 14",
        ),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(
    case: Callable[[str], Case], tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "r.safetensors", case("llama").got.spec)


def test_the_verb_refuses_bad_input(
    case: Callable[[str], Case], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "text.safetensors").write_text("text")
    folder = case("llama").folder
    for args, message in [
        ((tmp_path / "absent",), "no such folder"),
        ((tmp_path,), "config.json: no such file"),
        ((folder, "--reference", tmp_path / "absent"), "absent: no such file"),
        ((folder, "--reference", tmp_path / "text.safetensors"), "not a safetensors file"),
    ]:
        status, _, err = run(capsys, *args)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_code_beside_the_weights_is_not_run(tmp_path: Path, case: Callable[[str], Case]) -> None:
    c = case("llama")
    (tmp_path / "model.safetensors").symlink_to(c.folder / "model.safetensors")
    values = {**read_object(c.folder / "config.json"), "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    live = open_live(tmp_path, c.got.family, c.got.spec)
    assert type(live.model).__module__.startswith("transformers.models.llama")
    assert not (tmp_path / "ran").exists()


def test_what_transformers_cannot_load_is_one_clear_message(tmp_path: Path, case: Callable[[str], Case]) -> None:
    c = case("llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    with pytest.raises(ValueError, match=r"transformers \S+ cannot load it"):
        open_live(tmp_path, c.got.family, c.got.spec)
    (tmp_path / "config.json").write_text((c.folder / "config.json").read_text())
    tensors = load_file(c.folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"transformers finds no model\.norm\.weight"):
        open_live(tmp_path, c.got.family, c.got.spec)


def test_without_transformers_what_to_install_is_said(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, case("llama").folder)
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'assay[hf]'" in err


def test_the_first_step_inside_a_block() -> None:
    """In the order of computation; queries and keys count by their products, choices as sets."""
    one, two = torch.ones(3, 2), torch.full((3, 2), 2.0)
    names = ("mixer_norm", "mixer.q", "mixer.k", "mixer.scores", "mixer.mix", "mixer", "ffn")
    same = dict.fromkeys(names, one)
    assert first_step(same, same) is None
    assert first_step(same, {**same, "mixer.q": two, "mixer.k": two}) is None
    assert first_step(same, {**same, "mixer.k": two, "mixer.scores": two}) == ("mixer.k", 0.5)
    assert first_step(same, {**same, "mixer.k": two, "mixer.scores": two}, frozenset({"mixer.k"})) == (
        "mixer.scores",
        0.5,
    )
    assert first_step(same, {**same, "mixer": two, "mixer.mix": two, "ffn": two}) == ("mixer.mix", 0.5)
    chosen = {"ffn.router.choice": torch.tensor([[0, 1], [2, 0], [1, 3]])}
    turned = {"ffn.router.choice": torch.tensor([[1, 0], [2, 0], [3, 2]])}
    assert first_step({**same, **chosen}, turned) == ("ffn.router.choice", pytest.approx(1 / 3))


def test_sample_leaves_room_where_positions_end(case: Callable[[str], Case]) -> None:
    assert sample(case("llama").got.spec, 48).shape == (2, 48)
    got = case("gpt2").got
    assert sample(got.spec, 1000).shape == (2, 56)  # 64 positions, 8 of them for the continuation


def test_a_report_of_nothing_wrong_has_no_divergence(case: Callable[[str], Case]) -> None:
    c = case("llama")
    report: Report = compare(c.got, c.reference)
    assert (report.match, report.first_divergence, report.absent) == (True, None, ())
