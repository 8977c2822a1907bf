"""`assay train` and `assay eval` from the outside."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from assay.cli.main import main
from assay.measure import machine
from tests.train.small import MODEL, RECIPE


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "matmul_flop_s", lambda dtype, device: 1e11)  # measured elsewhere, and slow


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    paths = tmp_path / "model.yaml", tmp_path / "recipe.yaml"
    for path, tree in zip(paths, (MODEL, RECIPE), strict=True):
        path.write_text(yaml.safe_dump(tree))
    return str(paths[0]), str(paths[1])


def last(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.strip().split("\n")[-1])  # type: ignore[no-any-return]


def test_train_then_eval(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    options = ["--recipe", files[1], "--out", run, "--json", "--device", "cpu"]
    assert main(["train", files[0], *options, "model.layers=1", "recipe.tokens=256"]) == 0
    trained = last(capsys)
    assert trained["tokens"] == 256 and trained["steps"] == 4 and trained["checkpoint"] == run
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    assert main(["train", files[0], *options, "model.layers=1", "recipe.tokens=256", "--resume"]) == 0
    assert last(capsys)["loss_nats"] == trained["loss_nats"]
    text = tmp_path / "text.txt"
    text.write_text("Some text, of forty characters or more, with an é in it.\n")
    assert main(["eval", run, "--data", str(text), "--json", "--device", "cpu"]) == 0
    found = last(capsys)
    assert found["tokens"] == found["bytes"] == len(text.read_bytes())  # the separator is one, the first byte is none
    assert found["bits_per_byte"] == pytest.approx(found["loss_nats"] / math.log(2))


def test_eval_reads_json_lines(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["train", files[0], "--recipe", files[1], "--out", run, "recipe.tokens=64"]) == 0
    data = tmp_path / "data.jsonl"
    data.write_text('{"body": "one document"}\n{"body": "another"}\n')
    capsys.readouterr()
    assert main(["eval", run, "--data", str(data), "--field", "body", "--json"]) == 0
    assert last(capsys)["tokens"] == len("one document") + len("another")
    assert main(["eval", run, "--data", str(data)]) == 2
    assert "line 1: no field 'text'; the line has 'body'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "lab-64"], "--out: missing"),
        (["train", "lab-46", "--out", "RUN"], "lab-46: no such file, and no shipped name (did you mean 'lab-64'?)"),
        (["train", "lab-64", "--out", "RUN", "--recipe", "smok"], "(did you mean 'smoke'?)"),
        (["train", "lab-64", "--out", "RUN", "recipe.token=3"], "unknown field (did you mean 'tokens'?); accepted:"),
        (["train", "lab-64", "--out", "RUN", "recipe.tokens=-3"], "tokens: -3; accepted: a whole number from 1 on"),
        (["train", "lab-64", "--out", "RUN", "--resume", "--from", "X"], "give one of them"),
        (["train", "lab-64", "--out", "RUN", "--device", "tpu"], "--device 'tpu': accepted: auto"),
        (["eval", "RUN"], "--data: missing"),
        (["eval", "RUN", "--data", "FILE"], "RUN: not a checkpoint: it has no model.yaml"),
        (["eval", "RUN", "--data", "nothing"], "--data nothing: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("text")
    assert main([str(tmp_path / w) if w in ("RUN", "FILE") else w for w in words]) == 2
    said = capsys.readouterr()
    assert message in said.err.replace(f"{tmp_path}/", "") and said.err.count("\n") == 1 and not said.out


def test_a_run_that_does_not_fit_is_refused_with_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "lab-64", "--recipe", "smoke", "--out", str(tmp_path / "run"), "model.d_model=400000"]
    assert main([*words, "recipe.data.kind=generated"]) == 2
    assert "GiB of memory (weights" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
