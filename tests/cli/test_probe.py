"""assay probe: a tiny run end to end, what it counts, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from assay.cli.main import main
from assay.data.task_rows import HELD_OUT, TaskRows
from assay.data.tasks.base import tasks
from assay.data.tasks.mqar import Mqar
from assay.measure import probe
from assay.model.lm import build
from assay.ops.step import rows_step
from assay.spec.load import load_model, read_mapping, shelf
from assay.train.recipe import load_recipe

TASK = ["task.length=16", "task.pairs=2", "task.symbols=16"]
SMALL = ["model.d_model=16", "recipe.batch.rows=8", "recipe.evaluation.tokens=128", "recipe.evaluation.points=2"]


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SYMBOLS", 1024)


def probed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["probe", *words, *TASK, *SMALL, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_reports_what_the_contract_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = probed(capsys, "probe-attention", "--steps", "6", "--seed", "3", "recipe.optimizer.lr=2e-3")
    # Two layers of 16 tokens: a key and a value of 16 numbers each, and the convolution's last two inputs.
    assert found["state_bytes"] == 2 * (16 * 2 * 16 + 2 * 16) * 4
    assert found["steps"] == 6 and found["learning_rate"] == 2e-3 and found["seed"] == 3
    assert found["floor"] == 1 / 8 and found["shortcuts"] == {"last value": 0.5, "first value": 0.5}
    assert found["curve"]["steps"] == [3, 6] and len(found["curve"]["accuracy"]) == 2
    assert [(row["length"], row["factor"]) for row in found["lengths"]] == [(16, 1), (32, 2), (64, 4)]
    assert found["lengths"][0]["accuracy"] == found["accuracy"]
    assert found["task"] == {"kind": "mqar", "length": 16, "pairs": 2, "symbols": 16} | {
        "queries": "dense",
        "power": 0.01,
        "rewrites": 0,
        "parts": 1,
    }


def test_a_run_depends_on_its_seed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("probe-linear", "--steps", "2", "--seed")
    first, again, other = probed(capsys, *words, "1"), probed(capsys, *words, "1"), probed(capsys, *words, "2")
    assert first["loss_nats"] == again["loss_nats"] != other["loss_nats"]
    assert first["spec_digest"] == other["spec_digest"] and first["recipe_digest"] == other["recipe_digest"]


def test_it_learns_more_than_any_shortcut_knows(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["model.d_model=32", "recipe.batch.rows=32", "recipe.optimizer.lr=1e-2", "recipe.optimizer.lr_width=null"]
    words = ["probe", "probe-attention", "--steps", "120", *TASK, *SMALL[2:], *changes, "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] > 0.8


def test_a_sweep_reports_the_best_of_its_rates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "RATES", (1e-3, 1e-2))
    found = probed(capsys, "probe-attention", "--steps", "30", "--sweep")
    assert [row["learning_rate"] for row in found["sweep"]] == [1e-3, 1e-2]
    best = max(found["sweep"], key=lambda row: row["accuracy"])
    assert found["accuracy"] == best["accuracy"] and not any(row["diverged"] for row in found["sweep"])


def test_accuracy_counts_the_most_likely_symbol_of_each_row_alone() -> None:
    task = Mqar(length=16, pairs=3, symbols=12, queries="spaced")
    model = build(load_model("probe-linear", {"vocab": 12, "context": 16, "d_model": 16}), 5, torch.device("cpu"))
    drawn = task.draw(40, HELD_OUT)
    right = []
    with torch.no_grad():
        for row, targets in zip(drawn.inputs, drawn.targets, strict=True):
            logits = model.eval()(rows_step(torch.from_numpy(row)[None])).logits
            right += [int(logits[i].argmax()) == t for i, t in enumerate(targets.tolist()) if t >= 0]
    assert len(right) == 120
    assert probe.accuracy(model, task, 40) == sum(right) / 120


def test_rows_to_train_on_are_no_rows_to_score_on_and_go_on_where_they_stopped() -> None:
    task = Mqar(length=16, pairs=3, symbols=12)
    data = TaskRows(task)
    scored = {tuple(row) for row in data.held_out(16, 200).inputs.view(200, 16).tolist()}
    stream, other = data.stream(8, 16, seed=0), data.stream(8, 16, seed=0)
    batches = [next(stream) for _ in range(5)]
    trained = {tuple(row) for batch in batches for row in batch.inputs.view(8, 16).tolist()}
    assert len(trained) == 40 and not trained & scored
    for _ in range(2):
        next(other)
    resumed = data.stream(8, 16, seed=0)
    resumed.restore(json.loads(json.dumps(other.state())))
    assert torch.equal(next(resumed).inputs, batches[2].inputs)
    with pytest.raises(ValueError, match="another task, or another seed"):
        data.stream(8, 16, seed=1).restore(other.state())
    assert (batches[0].counted, batches[0].bytes) == (8 * 10, 8 * 10)


def test_symbols_are_numbers_to_the_tokenizer() -> None:
    tokenizer = TaskRows(Mqar(length=16, pairs=2, symbols=300)).tokenizer
    assert tokenizer.vocab_size == 300 and tokenizer.encode("299 7 15").tolist() == [299, 7, 15]
    assert tokenizer.decode([0, 12]) == "0 12"


def test_tasks_of_one_recipe_have_digests_of_their_own() -> None:
    plain = load_recipe("probe", {"precision": "float32"})
    more = load_recipe("probe", {"precision": "float32", "data.pairs": 8})
    assert plain.data == Mqar() and more.data == Mqar(pairs=8)
    assert len({plain.digest, more.digest}) == 2
    assert len({TaskRows(made(length=64)).digest for made in (tasks()["mqar"], tasks()["parity"])}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch.length": 32}, "batch.length: 32; the rows of data have 64 symbols"),
        ({"tokenizer.kind": "char"}, r"tokenizer: a task \(mqar\) brings its own symbols: leave it out"),
        ({"mix.share": 0.5}, r"mix: a task \(mqar\) brings its own symbols"),
        ({"loss.prefix": True}, "loss: prefix and hidden ask for text"),
        ({"data.pairs": 40}, "data: length: 64; 40 pairs"),
        ({"data.pears": 4}, "data.pears: unknown field"),
    ],
)
def test_a_recipe_refuses_what_would_change_a_tasks_rows(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("probe", changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "mqr"], "unknown task 'mqr' (did you mean 'mqar'?); accepted: "),
        (["task.pears=3"], "task: pears: unknown field"),
        (["task.pairs=30"], "task: length: 64; 30 pairs, each asked, need 120 or more"),
        (["task.pairs=3", "task.pairs=4"], "task.pairs: given twice"),
        (["task.kind=copy"], "task.kind: --task names it"),
        (["pairs=4"], "'pairs=4': an override begins with task., model. or recipe."),
        (["model.vocab=5"], "model.vocab: comes from the task: the task has 256 symbols"),
        (["recipe.data.pairs=5"], "recipe.data: --task and task.field=value says it here"),
        (["recipe.tokens=5"], "recipe.tokens: --steps says it here"),
        (["model.blocks.*.mixer.heads=5"], "heads"),
        (["--recipe", "smok"], "smok"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "probe-attention", "--steps", "1", *words]) == 2
    told = capsys.readouterr()
    assert not told.out and message in told.err and len(told.err.splitlines()) == 1


def test_a_model_whose_positions_end_is_not_asked_beyond_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "learned.yaml"
    path.write_text(
        "{d_model: 16, vocab: 256, context: 64, layers: 1, positions: {p: {kind: learned}}, head: lm,"
        " blocks: {b: {mixer: {kind: gqa, heads: 1, position: p}}}}"
    )
    longer = probed(capsys, str(path), "--steps", "1")["lengths"][1]
    assert (
        longer["accuracy"] is None
        and longer["reason"] == "refused: 32 tokens, and the positions of this model end at 16"
    )


def test_stored_rates_are_of_shipped_models_and_tasks() -> None:
    for kind, path in shelf("probes").items():
        assert kind in tasks()
        for model, rate in read_mapping(path).items():
            assert model in shelf("models") and isinstance(rate, float) and math.isfinite(rate) and rate > 0
            assert probe.stored_rate(tasks()[kind](), model) == rate
    assert probe.stored_rate(Mqar(), "gpt-11m") is None


@pytest.mark.parametrize("name", [name for name in shelf("models") if name.startswith("probe-")])
def test_shipped_probes_are_built_alike(name: str) -> None:
    """Two layers of width 64 behind a short convolution, without ffn and positions."""
    spec = load_model(name)
    assert (spec.d_model, len(spec.expand()), dict(spec.positions)) == (64, 2, {})
    for stages in spec.expand():
        (stage,) = stages
        (branch,) = stage.branches
        assert branch.conv is not None and branch.conv.size == 3 and branch.part.slot == "mixers"  # type: ignore[attr-defined]
