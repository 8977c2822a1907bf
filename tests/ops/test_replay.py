"""What whoever records a step may rely on, of a tape on a CPU and of a graph on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from assay.ops.graph import Replay, captured
from assay.ops.native import Kernels
from assay.ops.tape import Recorder, Unrecordable

Call = Callable[[], Tensor]
Record = Callable[[Call], tuple[Tensor, Replay]]
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
)


@pytest.fixture
def record(device: str, kernels: Kernels) -> Record:
    def taped(call: Call) -> tuple[Tensor, Replay]:
        recorder = Recorder(kernels.library, kernels.table)
        with recorder:
            out = call()
        return out, recorder.tape()

    return taped if device == "cpu" else captured


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_computes_again_from_what_stands_there(record: Record, device: str) -> None:
    w, x, pool = torch.randn(5, 4, device=device), torch.zeros(2, 4, device=device), torch.zeros(3, 5, device=device)
    place = torch.tensor([0, 1], device=device)

    def step() -> Tensor:
        pool.index_copy_(0, place, torch.nn.functional.linear(x, w))
        return pool.exp().sum(0)

    with torch.inference_mode():
        step()
        out, replay = record(step)
        for seed in range(2):
            x.copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))
            place.copy_(torch.tensor([2, seed]))
            kept = pool.clone()
            replay.run()
            kept[place] = x @ w.T
            torch.testing.assert_close(pool, kept)
            torch.testing.assert_close(out, kept.exp().sum(0))
        x.zero_()
        assert all(seconds >= 0 for _, seconds in replay.timed())
        torch.testing.assert_close(out, pool.exp().sum(0))
        assert float(pool[place].abs().sum()) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_what_waits_for_a_result_is_refused(record: Record, device: str) -> None:
    x = torch.ones(3, device=device)
    with torch.inference_mode(), pytest.raises(Unrecordable):
        record(lambda: x[x > 0])
