"""Replicas and shards compute what one process computes: losses, norms, weights and the optimiser's state."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tests.train.parallel.plans import Found, together
from tests.train.parallel.replicas import MODELS, made, steps


@lru_cache(maxsize=8)
def alone(kind: str) -> Found:
    if kind == "float32":
        return steps(made(MODELS["moe"], None, torch.float32))
    return steps(made(MODELS[kind], None))


@pytest.fixture(scope="module")
def two() -> list[Found]:
    return together("tests.train.parallel.replicas:everything", 2)


def compare(found: Found, case: str) -> None:
    kind = case.rpartition("/")[2]
    own = {name.removeprefix(f"{case}:"): t for name, t in found.items() if name.startswith(f"{case}:")}
    want, margin = alone(kind), 1e-5 if kind == "float32" else 1e-10
    assert own.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(own[name], t, rtol=margin, atol=margin, msg=lambda m, n=name: f"{case} {n}: {m}")


@pytest.mark.parametrize("kind", [*MODELS, "float32"])
@pytest.mark.parametrize("layout", ["data2", "shard2"])
def test_two_processes_compute_what_one_computes(two: list[Found], layout: str, kind: str) -> None:
    compare(two[0], f"{layout}/{kind}")
    assert torch.equal(two[0][f"{layout}/{kind}:loss"], two[1][f"{layout}/{kind}:loss"])
