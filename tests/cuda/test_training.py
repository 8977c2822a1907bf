"""Training on CUDA against the same run on the CPU, and a run that was stopped against one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from assay.train.loop import Options, train
from assay.train.outcome import TrainResult
from tests.train.small import model, recipe

QUIET = Options(save_s=1e9)


def losses(device: str, precision: str, **more: object) -> list[float]:
    how = recipe(precision=precision, **more)
    return [loss for _, loss in train(model(), how, device=device, options=QUIET).losses]


@pytest.mark.parametrize(("precision", "error"), [("float32", 2e-4), ("bfloat16", 0.05)])
def test_the_same_losses_as_on_the_cpu(precision: str, error: float) -> None:
    """The same weights, rows and order: what differs is rounding, which grows over the steps."""
    there, here = losses("cpu", "float32"), losses("cuda", precision)
    assert len(here) == len(there) == 8
    assert max(abs(a - b) for a, b in zip(here, there, strict=True)) < error


def test_pieces_equal_the_whole_batch() -> None:
    whole, cut = losses("cuda", "float32"), losses("cuda", "float32", batch__accumulate=2)
    assert max(abs(a - b) for a, b in zip(whole, cut, strict=True)) < 2e-4


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def stop_at_four(status: object, result: TrainResult) -> None:
        if result.steps == 4:
            raise InterruptedError

    whole = train(model(), recipe(), device="cuda", options=QUIET)
    stopped = Options(save_s=0.0, on_validation=stop_at_four)
    with pytest.raises(InterruptedError):
        train(model(), recipe(), tmp_path, device="cuda", options=stopped)
    again = train(model(), recipe(), tmp_path, True, "cuda", options=QUIET)
    assert [n for n, _ in again.losses] == [n for n, _ in whole.losses]
    assert max(abs(a - b) for (_, a), (_, b) in zip(again.losses, whole.losses, strict=True)) < 2e-4
    assert again.evaluation is not None and whole.evaluation is not None
    assert abs(again.evaluation.loss_nats - whole.evaluation.loss_nats) < 2e-4


@pytest.mark.traces
def test_compiled_equals_plain() -> None:
    plain = train(model(), recipe(), device="cuda", options=QUIET)
    fast = train(model(), recipe(), device="cuda", options=Options(compile=True))
    assert max(abs(a - b) for (_, a), (_, b) in zip(plain.losses, fast.losses, strict=True)) < 2e-3
    torch._dynamo.reset()
