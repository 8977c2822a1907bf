"""Search: ranges, real small runs in a database that Optuna reads, resuming, pruning, and a password kept nowhere."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assay.cli.main import main
from assay.laws.search import Axis, Search, best, hidden, open_study, parse_axis, search_on, write_best
from assay.spec.load import load_model
from assay.train.loop import train
from assay.train.recipe import load_recipe
from tests.train.small import model, recipe

optuna = pytest.importorskip("optuna", reason="needs the extra `search`")
AXES = (parse_axis("recipe.optimizer.lr=log:1e-4..1e-1"), parse_axis("model.blocks.*.mixer.kv_heads=1,2"))


def search(folder: Path, **changes: Any) -> Search:
    made = Search("s", model(), recipe(), AXES, f"sqlite:///{folder / 'search.db'}", 2, "none", 2)
    return replace(made, **changes)


def test_ranges_are_read() -> None:
    assert parse_axis("recipe.optimizer.lr=log:1e-4..1e-1") == Axis("recipe.optimizer.lr", 1e-4, 1e-1, True)
    assert parse_axis("model.layers=2..6") == Axis("model.layers", 2, 6)
    assert parse_axis("model.d_model=32, 64") == Axis("model.d_model", choices=(32, 64))
    assert parse_axis("recipe.clip=null,1.0").choices == (None, 1.0)
    for text in ("lr=1..2", "model.layers", "model.layers=4", "model.layers=6..2", "recipe.x=log:0..1", "model.x=a..b"):
        with pytest.raises(ValueError, match="accepted"):
            parse_axis(text)


def test_a_search_is_resumed_read_by_optuna_and_its_best_is_the_run_it_names(tmp_path: Path) -> None:
    asked = search(tmp_path)
    first = search_on(asked).trials
    assert [t.state.name for t in first] == ["COMPLETE"] * 2
    more = search_on(replace(asked, trials=3))
    assert len(more.trials) == 3 and [t.params for t in more.trials[:2]] == [t.params for t in first]
    assert len({t.params["recipe.optimizer.lr"] for t in more.trials}) == 3  # nothing is suggested twice
    assert len(search_on(replace(asked, trials=3)).trials) == 3
    # As the dashboard opens it: by URL and name, without anything of ours.
    plain = optuna.load_study(study_name="s", storage=asked.storage)
    assert plain.best_value == min(t.value for t in more.trials)
    assert all(sorted(t.intermediate_values) == [1, 2] for t in plain.trials)
    found = best(asked, plain)
    assert found is not None and found["loss_nats"] == plain.best_value
    spec_file, recipe_file = write_best(asked, found, tmp_path)
    trained = train(load_model(spec_file), load_recipe(recipe_file))
    assert trained.evaluation is not None and trained.evaluation.loss_nats == plain.best_value
    assert found["changes"]["model.blocks.*.mixer.kv_heads"] in (1, 2)


def test_what_is_pruned_diverges_or_cannot_be_built_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = search(tmp_path, axes=(parse_axis("recipe.optimizer.lr=1e29,1e30"),), trials=1)
    assert "diverged" in search_on(wild).trials[0].user_attrs["why"]
    odd = search(tmp_path, name="odd", axes=(parse_axis("model.blocks.*.mixer.heads=3,5"),), trials=1)
    (trial,) = search_on(odd).trials
    assert trial.state.name == "PRUNED" and "head" in trial.user_attrs["why"] and best(odd, search_on(odd)) is None
    monkeypatch.setattr("assay.laws.search._pruner", lambda asked: optuna.pruners.ThresholdPruner(upper=0.0))
    (trial,) = search_on(search(tmp_path, name="cut", trials=1)).trials
    assert trial.state.name == "PRUNED" and sorted(trial.intermediate_values) == [1]


def test_asha_stops_two_in_three_at_each_rung(tmp_path: Path) -> None:
    study = open_study(search(tmp_path, pruner="asha", points=9))
    stopped = []
    for value in range(9):  # each worse than those before
        trial, last = study.ask(), 9
        for step in range(1, 10):
            trial.report(float(value), step)
            if trial.should_prune():
                last = step
                break
        stopped.append(last)
        study.tell(
            trial, float(value) if last == 9 else None, state=None if last == 9 else optuna.trial.TrialState.PRUNED
        )
    assert stopped[0] == 9 and stopped[1:] == [1] * 8


def test_another_search_by_this_name_is_refused(tmp_path: Path) -> None:
    open_study(search(tmp_path))
    open_study(search(tmp_path, trials=99))
    with pytest.raises(ValueError, match=r"holds another search 's' \(axes differ\)"):
        open_study(search(tmp_path, axes=AXES[:1]))
    with pytest.raises(ValueError, match="kv_heads: searched twice"):
        search(tmp_path, axes=(*AXES, AXES[1]))
    with pytest.raises(ValueError, match=r"\(recipe differ\)"):
        open_study(search(tmp_path, recipe=recipe(tokens=1024)))


def test_a_password_is_neither_shown_nor_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, secret = "postgresql://me:hunter22@127.0.0.1:1/db", "hunter22"
    assert secret not in hidden(url) and hidden(url) == "postgresql://me:***@127.0.0.1:1/db"
    asked = search(tmp_path, storage="postgresql://me@127.0.0.1:1/db", password=secret)
    assert secret not in repr(asked)
    for one in (asked, search(tmp_path, storage=url)):
        with pytest.raises(ValueError, match="storage postgresql://me") as error:
            open_study(one)
        assert secret not in str(error.value) and error.value.__cause__ is None
    (tmp_path / "word").write_text(f"{secret}\n")
    argv = ["search", "lab-64", "--over", "recipe.optimizer.lr=log:1e-4..1e-1", "--out", str(tmp_path / "o")]
    assert main([*argv, "--storage", url]) == 2
    assert main([*argv, "--storage", "postgresql://me@127.0.0.1:1/db", "--password-file", str(tmp_path / "word")]) == 2
    said = capsys.readouterr()
    assert secret not in said.out + said.err and "pip install" in said.err
    assert not any(secret in path.read_text(errors="replace") for path in (tmp_path / "o").rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="storage: not a URL"):
        hidden("nothing")


@pytest.mark.slow
def test_workers_share_a_search_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["search", "lab-64", "--out", str(tmp_path), "--over", "recipe.optimizer.lr=log:1e-4..1e-2", "--points", "3"]
    small = ["recipe.tokens=4096", "recipe.data.kind=generated", "recipe.evaluation.tokens=1024"]
    assert main([*argv, "--trials", "4", "--workers", "2", "--json", *small]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(found["trials"].get(state, 0) for state in ("complete", "pruned")) in (4, 5)
    with sqlite3.connect(tmp_path / "search.db") as base:
        assert base.execute("select study_name from studies").fetchall() == [("lab-64",)]
    assert {p.name for p in tmp_path.glob("best-*.yaml")} == {"best-model.yaml", "best-recipe.yaml"}
