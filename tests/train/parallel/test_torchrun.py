"""`assay train` under torchrun: the same run, a killed process that is named, and a restart that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from assay.train.folder import METRICS, read_metrics
from assay.train.loop import train
from assay.train.parallel.mesh import check_processes
from assay.train.parallel.roll import CALL_S
from assay.train.parallel.spec import ParallelSpec
from assay.train.recipe import change_recipe
from tests.train.small import MODEL, RECIPE, model, recipe

ROOT = Path(__file__).parents[3]
DIES = Path(__file__).with_name("dies.py")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    paths = tmp_path / "model.yaml", tmp_path / "recipe.yaml"
    for path, tree in zip(paths, (MODEL, RECIPE), strict=True):
        path.write_text(yaml.safe_dump(tree))
    return ["train", str(paths[0]), "--recipe", str(paths[1]), "--out", str(tmp_path / "run"), "--device", "cpu"]


def launch(command: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """torchrun with two processes; --standalone takes a free port."""
    found = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(found, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tok_s"} for row in read_metrics(folder / METRICS)]


def same_as_alone(folder: Path) -> None:
    """Losses, norms and validation of every step, and the weights, are those of one process."""
    alone = train(model(), recipe(), folder.with_name("alone"))
    for row, want in zip(curve(folder), curve(folder.with_name("alone")), strict=True):
        assert row == pytest.approx(want, rel=1e-5)
    weights = load_file(folder / "model.safetensors")
    for name, parameter in alone.model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-5)


def test_a_run_of_two_processes_is_the_run_of_one(words: list[str], tmp_path: Path) -> None:
    found = launch(["-m", "assay", *words, "--json", "recipe.parallel.shard=2"])
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("validation loss") == 1, "one process speaks"
    same_as_alone(tmp_path / "run")
    # What is in the folder is a run like any other: one process takes it up, and finds it complete.
    assert train(model(), recipe(), tmp_path / "run", resume=True).steps == 8


@pytest.mark.slow
def test_a_killed_process_is_named_and_a_restart_goes_on(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--resume", "--save-every", "0.001", "recipe.parallel.data=2"]
    found = launch([str(DIES), "1", "kill", *words], "--max-restarts", "1")
    assert found.returncode == 0, found.stderr
    assert "error: process 1 of 0 to 1: killed, or no longer to be reached" in found.stderr
    same_as_alone(tmp_path / "run")


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_so_long_and_no_longer(words: list[str], tmp_path: Path) -> None:
    start = time.monotonic()
    found = launch([str(DIES), "1", "never", *words, "recipe.parallel.data=2", "recipe.tokens=256"])
    usual = time.monotonic() - start
    assert found.returncode == 0, found.stderr
    words = [w.replace("run", "other") if w.endswith("run") else w for w in words]
    start = time.monotonic()
    found = launch([str(DIES), "1", "sleep", *words, "recipe.parallel.data=2", "recipe.parallel.timeout_s=4"])
    took = time.monotonic() - start
    assert found.returncode != 0 and "process 1 is there, but behind" in found.stderr
    assert took < 4 + CALL_S + 20 + 3 * usual, "the sleeper wakes after 20 s, and torchrun waits for it"


def test_axes_that_do_not_make_the_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data 2 x tensor 2 makes 4 processes; 3 were started \(torchrun"):
        check_processes(ParallelSpec(data=2, tensor=2), 3)
    with pytest.raises(ValueError, match=r"recipe.parallel: one process makes 1 processes; 2 were started"):
        check_processes(ParallelSpec(), 2)
    with pytest.raises(ValueError, match=r"recipe.parallel: data 2 makes 2 processes; 1 were started"):
        train(model(), recipe(parallel__data=2))


def test_how_a_run_is_carried_out_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    plain, spread = recipe(), recipe(parallel__data=2, parallel__timeout_s=5.0, recompute="full")
    assert plain.digest == spread.digest and spread.computed == plain
    assert change_recipe(plain, {"recipe.clip": 0.5}).digest != plain.digest
    train(model(), recipe(recompute="full", tokens=128), tmp_path)
    assert "recompute: none" in (tmp_path / "recipe.yaml").read_text()
    assert train(model(), recipe(tokens=128), tmp_path, resume=True).steps == 2
