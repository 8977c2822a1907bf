"""Schedules at places where their value is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from assay.train.recipe import ScheduleSpec
from assay.train.schedule import factor


def values(steps: int, **fields: Any) -> list[float]:
    return [factor(ScheduleSpec(**fields), i, steps) for i in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind: str) -> None:
    rising = values(100, kind=kind, warmup=0.1)[:10]
    assert rising == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values(100, kind=kind, warmup=10)[:10] == rising


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_is_final(kind: str) -> None:
    assert values(80, kind=kind, final=0.1)[-1] == pytest.approx(0.1)


def test_cosine_equals_the_formula_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.2)
    expected = []
    for _ in range(50):
        optimizer.step()
        peer.step()
        expected.append(peer.get_last_lr()[0])
    assert values(50, kind="cosine", warmup=0.0, final=0.2) == pytest.approx(expected)


def test_halfway_values() -> None:
    # Warmup 20 of 120 steps: step 69 is halfway through the other 100.
    assert values(120, kind="cosine", warmup=20, final=0.0)[69] == pytest.approx(0.5)
    assert values(120, kind="linear", warmup=20, final=0.5)[69] == pytest.approx(0.75)
    assert values(120, kind="cosine", warmup=20, final=0.0)[44] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_flat_until_its_decay() -> None:
    found = values(100, kind="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert found[9:80] == [1.0] * 71
    assert found[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])
    assert found == pytest.approx(values(100, kind="wsd", warmup=10, decay=20, final=0.0))


def test_constant_has_no_decay_and_short_runs_are_all_warmup() -> None:
    assert values(10, kind="constant", warmup=0.0) == [1.0] * 10
    assert values(2, kind="cosine", warmup=8) == [0.5, 1.0]
    assert values(3, kind="wsd", warmup=1, decay=50, final=0.0) == pytest.approx([1.0, 0.5, 0.0])
