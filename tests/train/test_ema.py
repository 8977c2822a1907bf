"""The average of the weights against its definition, over the weights of every step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from assay.data.tokenizers import Tokenizer
from assay.train.checkpoint import load_checkpoint
from assay.train.ema import FOLDER, Average, average_of
from assay.train.evaluate import evaluate
from assay.train.folder import METRICS, read_metrics
from assay.train.learner import Learner
from assay.train.loop import Options, train
from tests.train.small import data, learner, model, recipe
from tests.train.test_resume import EVERY, stop_at

DECAY = 0.7


def test_it_is_the_weighted_mean_of_every_step() -> None:
    how = recipe(evaluation__ema=DECAY)
    run = learner(how=how)
    seen = []
    for step in range(6):
        run.step(step, 8)
        seen.append({name: p.detach().double().clone() for name, p in run.model.named_parameters()})
    weights = [DECAY ** (5 - step) for step in range(6)]
    assert run.average is not None
    with run.average.shown():
        for name, p in run.model.named_parameters():
            expected = sum(w * step[name] for w, step in zip(weights, seen, strict=True)) / sum(weights)
            assert torch.allclose(p.double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p.double(), seen[-1][name]) for name, p in run.model.named_parameters())


def test_training_is_as_without_it_and_the_average_is_kept_beside(tmp_path: Path) -> None:
    plain = train(model(), recipe(), tmp_path / "plain")
    found = train(model(), recipe(evaluation__ema=DECAY), tmp_path / "run")
    assert found.losses == plain.losses and found.valid_losses == plain.valid_losses and plain.averaged is None
    mean, tokenizer, _ = load_checkpoint(tmp_path / "run" / FOLDER)
    assert isinstance(tokenizer, Tokenizer) and not (tmp_path / "plain" / FOLDER).exists()
    nats = evaluate(mean, [data().held_out(16, 4)]).loss_nats
    assert found.averaged is not None and nats == found.averaged.loss_nats != found.evaluation.loss_nats  # type: ignore[union-attr]
    rows = [row for row in read_metrics(tmp_path / "run" / METRICS) if "valid_nats" in row]
    assert rows[-1]["valid_ema_nats"] == nats and len(rows) == 2


def test_a_stopped_run_goes_on_with_its_average(tmp_path: Path) -> None:
    how = recipe(evaluation__ema=DECAY)
    train(model(), how, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(model(), how, tmp_path / "cut", on_progress=stop_at(3), options=EVERY)
    train(model(), how, tmp_path / "cut", resume=True)
    left, right = (load_checkpoint(tmp_path / name / FOLDER)[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_cannot_hold_it_is_refused(tmp_path: Path) -> None:
    made: dict[str, torch.Tensor] = {}
    assert average_of(None, made, True, True) is None and isinstance(average_of(0.5, made, False, False), Average)
    with pytest.raises(ValueError, match=r"recipe.evaluation.ema: 0.5; this plan cuts the weights"):
        average_of(0.5, made, True, False)
    with pytest.raises(ValueError, match="averages the weights itself"):
        Learner(
            model(),
            recipe(evaluation__ema=0.5, optimizer={"kind": "schedule_free"}, schedule={"kind": "constant"}),
            data(),
            torch.device("cpu"),
        )
    with pytest.raises(ValueError, match="ema"):
        recipe(evaluation__ema=1.0)
    train(model(), recipe(), tmp_path, options=Options())
    with pytest.raises(ValueError, match="lacks 'ema_steps'"):
        train(model(), recipe(evaluation__ema=0.5), tmp_path / "branch", resume=tmp_path)
