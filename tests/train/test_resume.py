"""A run that is stopped, in whatever way, goes on as if it had not been."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from assay.train import checkpoint
from assay.train.checkpoint import load_checkpoint, read_run
from assay.train.folder import METRICS, claim, in_use, read_metrics
from assay.train.learner import Learner, Taken
from assay.train.loop import Options, train
from assay.train.outcome import Diverged, Status, TrainResult
from tests.train.small import data, model, recipe

ROOT = Path(__file__).parent.parent.parent


def lines(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock says."""
    return [{k: v for k, v in row.items() if k != "tok_s"} for row in read_metrics(folder / METRICS)]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters()}


def same(a: TrainResult, b: TrainResult) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def stop_at(step: int, signum: int = signal.SIGINT) -> Callable[[Status], None]:
    def watch(status: Status) -> None:
        if status.step == step:
            os.kill(os.getpid(), signum)

    return watch


EVERY = Options(report_s=0.0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_resumes_bit_for_bit(tmp_path: Path, signum: int) -> None:
    spec, how = model(), recipe(mix__share=0.0)
    spec = spec.model_validate(spec.model_dump() | {"embed": {"kind": "token", "dropout": 0.1}})  # draws random numbers
    whole = train(spec, how, tmp_path / "whole")
    for step in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            train(spec, how, tmp_path / "cut", resume=step > 3, on_progress=stop_at(step, signum), options=EVERY)
        saved = read_run(tmp_path / "cut")
        assert saved is not None and saved.step == step
    rest = train(spec, how, tmp_path / "cut", resume=True)
    assert rest.losses == whole.losses and rest.valid_losses == whole.valid_losses
    assert same(rest, whole) and lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(model(), recipe(tokens=1280), tmp_path / "whole")
    found = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(tmp_path / "cut"), "11", "6"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    killed, *saved = map(int, found.stdout.split())
    assert killed >= 3 and any(0 < step < 20 for step in saved), f"no kill fell between two saves: {saved}"
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    there = dict(load_checkpoint(tmp_path / "cut")[0].named_parameters())
    assert all(torch.equal(there[n], w) for n, w in weights(whole).items())


def test_a_complete_run_resumes_to_its_own_result(tmp_path: Path) -> None:
    first = train(model(), recipe(), tmp_path)
    again = train(model(), recipe(), tmp_path, resume=True)
    assert same(first, again) and again.losses == first.losses and again.valid_losses == first.valid_losses
    assert again.evaluation == first.evaluation


def test_a_diverged_run_names_its_step_and_keeps_its_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Learner.step

    def step(self: Learner, number: int, steps: int) -> Taken:
        taken = real(self, number, steps)
        return replace(taken, loss=torch.tensor(float("nan"))) if number == 4 else taken

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        with pytest.raises(Diverged, match=r"step 5 of 8: the loss is nan; .* as it was after step 4") as caught:
            train(model(), recipe(), tmp_path, options=Options(save_s=0.0))
    assert caught.value.step == 5
    assert same(train(model(), recipe(), tmp_path, resume=True), train(model(), recipe()))


def test_a_branch_of_a_stable_run_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """Warmup, stable, decay: the decay may begin at any save of a run whose rate was still constant."""
    stable = {"schedule__kind": "constant", "schedule__warmup": 2}
    decay = {"schedule__kind": "wsd", "schedule__warmup": 2, "schedule__decay": 3, "schedule__final": 0.0}
    train(model(), recipe(tokens=5 * 64, **stable), tmp_path / "stable")
    whole = train(model(), recipe(tokens=8 * 64, **decay), tmp_path / "whole")
    branch = train(model(), recipe(tokens=8 * 64, **decay), tmp_path / "branch", resume=tmp_path / "stable")
    assert same(branch, whole) and branch.losses == whole.losses[5:]
    with pytest.raises(ValueError, match=r"another run \(recipe .*recipe.clip: 1.0 there, None here"):
        train(model(), recipe(clip=None, **decay), tmp_path / "other", resume=tmp_path / "stable")
    with pytest.raises(ValueError, match="saved after 5 steps; this run has 2"):
        train(model(), recipe(tokens=128, **decay), tmp_path / "short", resume=tmp_path / "stable")


def test_a_folder_is_not_shared_or_overwritten(tmp_path: Path) -> None:
    train(model(), recipe(), tmp_path)
    before = lines(tmp_path)
    with pytest.raises(ValueError, match="holds this run already; resume it"):
        train(model(), recipe(), tmp_path)
    with pytest.raises(ValueError, match=r"another run \(recipe \w+, not \w+\): recipe.tokens: 512 there, 640 here"):
        train(model(), recipe(tokens=640), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"recipe.seed: 0 there, 3 here"):
        train(model(), recipe(seed=3), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"another run \(model \w+, not \w+\): model.layers: 2 there, 1 here"):
        train(model(layers=1), recipe(), tmp_path, resume=True)
    with in_use(tmp_path), pytest.raises(ValueError, match="in use by another run"):
        train(model(), recipe(), tmp_path, resume=True)
    assert lines(tmp_path) == before


def test_a_folder_whose_run_saved_nothing_is_free(tmp_path: Path) -> None:
    claim(tmp_path, model(layers=1), recipe(), data().tokenizer, resume=False)
    assert train(model(), recipe(), tmp_path).steps == 8


def test_a_torn_line_is_dropped_and_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / METRICS) == [{"step": 1}, {"step": 2}]
    (tmp_path / METRICS).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(tmp_path / METRICS)


def full(*args: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(model(), recipe(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(model(), recipe(), tmp_path / "cut", on_progress=stop_at(3), options=EVERY)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError) as caught:
            train(model(), recipe(), tmp_path / "cut", resume=True, options=Options(save_s=0.0))
    assert caught.value.errno == errno.ENOSPC and str(tmp_path / "cut") in str(caught.value)
    assert not list((tmp_path / "cut").glob("**/*.part"))
    saved = read_run(tmp_path / "cut")
    assert saved is not None and saved.step == 3
    assert same(train(model(), recipe(), tmp_path / "cut", resume=True), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_write_that_the_system_refuses_keeps_the_last_save(tmp_path: Path) -> None:
    """A real failure of write(2): files may not grow beyond a few kilobytes."""
    whole = train(model(), recipe(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(model(), recipe(), tmp_path / "cut", on_progress=stop_at(2), options=EVERY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError) as caught:
            train(model(), recipe(), tmp_path / "cut", resume=True, options=Options(save_s=0.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert same(train(model(), recipe(), tmp_path / "cut", resume=True), whole)
