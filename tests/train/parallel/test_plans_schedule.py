"""Pipeline schedules: the bubble of the simulated schedule is the papers' formula, and so are the activations held."""

from __future__ import annotations

import pytest

from assay.spec.shard import spans
from assay.train.parallel.schedule import KINDS, Kind, Task, order, simulate

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 4, 7, 16)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_the_bubble_is_the_formula(kind: Kind, stages: int, micro: int) -> None:
    run = simulate([order(kind, s, stages, micro) for s in range(stages)])
    assert run.bubble == pytest.approx((stages - 1) / (micro + stages - 1), abs=1e-12)


@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_what_is_held(stages: int, micro: int) -> None:
    """1F1B holds p - s micro-batches at stage s, GPipe all."""
    one = simulate([order("1f1b", s, stages, micro) for s in range(stages)])
    assert one.held == tuple(min(stages - s, micro) for s in range(stages))
    assert simulate([order("gpipe", s, stages, micro) for s in range(stages)]).held == (micro,) * stages


@pytest.mark.parametrize("kind", KINDS)
def test_each_micro_batch_once_each_way(kind: Kind) -> None:
    for stage in range(4):
        tasks = order(kind, stage, 4, 5)
        assert sorted((t.micro, t.back) for t in tasks) == [(i, b) for i in range(5) for b in (False, True)]
        assert all(tasks.index(Task(i)) < tasks.index(Task(i, True)) for i in range(5))


def test_orders_that_wait_for_one_another_are_refused() -> None:
    with pytest.raises(ValueError, match="wait for one another"):
        simulate([[Task(0, True), Task(0)], [Task(0), Task(0, True)]])


def test_layers_are_dealt_out_evenly() -> None:
    assert [list(r) for r in spans(5, 2)] == [[0, 1], [2, 3, 4]]
    with pytest.raises(ValueError, match=r"parallel.pipeline: 3; the model has 2 layers: accepted: 1 to 2"):
        spans(2, 3)
    with pytest.raises(ValueError, match="schedule: 'zb'; accepted: 1f1b, gpipe"):
        order("zb", 0, 1, 1)  # type: ignore[arg-type]
