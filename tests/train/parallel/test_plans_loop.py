"""The plans through the one training loop: pieces of a batch, clipping, dropout, balance; alone and in products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from assay.spec.model import ModelSpec
from tests.train.parallel.plans import Found, together
from tests.train.parallel.replicas import DELTA, GATED, GQA, MLA, MOE, made, mesh_of, steps, under
from tests.train.small import model

BIASED: dict[str, Any] = GQA | {"bias": "all", "qk_norm": {}}
SHARED: dict[str, Any] = MOE | {"shared": {"kind": "gated", "width": 8}}
MODELS: dict[str, ModelSpec] = {
    "dense": model(blocks={"b": {"mixer": BIASED, "ffn": GATED}}),
    "dropped": model(
        blocks={"b": {"mixer": BIASED, "ffn": GATED, "dropout": 0.1}}, embed={"kind": "token", "dropout": 0.1}
    ),
    "mla": model(blocks={"b": {"mixer": MLA, "ffn": GATED}}, head={"kind": "lm"}),
    "moe": model(blocks={"b": {"mixer": GQA, "ffn": SHARED}}),
    "hybrid": model(
        layers=3, pattern=["d", "d", "a"], blocks={"d": {"mixer": DELTA}, "a": {"mixer": GQA, "ffn": GATED}}
    ),
}
ALONE = [
    ({"tensor": 2}, ("dropped", "mla", "moe", "hybrid")),
    ({"expert": 2}, ("moe",)),
    ({"context": 2}, ("dense", "mla", "moe", "hybrid")),
    ({"pipeline": 2}, ("dense", "mla", "moe", "hybrid")),
]
PRODUCTS = [
    ({"data": 2, "tensor": 2}, ("dropped", "moe")),
    ({"shard": 2, "tensor": 2}, ("mla",)),
    ({"data": 2, "expert": 2}, ("moe",)),
    ({"shard": 2, "expert": 2}, ("moe",)),
    ({"tensor": 2, "expert": 2}, ("moe",)),
    ({"data": 2, "context": 2}, ("moe", "hybrid")),
    ({"tensor": 2, "context": 2}, ("dense", "hybrid")),
    ({"context": 4}, ("hybrid",)),
    ({"data": 2, "pipeline": 2}, ("dense", "moe")),
    ({"tensor": 2, "pipeline": 2}, ("dense", "hybrid")),
    ({"context": 2, "pipeline": 2}, ("hybrid",)),
    ({"expert": 2, "pipeline": 2}, ("moe",)),
]


def named(layout: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in layout.items())


def cases(layouts: list[tuple[dict[str, int], tuple[str, ...]]]) -> list[str]:
    return [f"{named(layout)}/{kind}" for layout, kinds in layouts for kind in kinds]


def everything(rank: int, processes: int) -> Found:
    found: Found = {}
    for layout, kinds in ALONE if processes == 2 else PRODUCTS:
        mesh = mesh_of(**layout)
        for kind in kinds:
            found |= under(f"{named(layout)}/{kind}", steps(made(MODELS[kind], mesh)))
    return found


@pytest.fixture(scope="module")
def two() -> list[Found]:
    return together("tests.train.parallel.test_plans_loop:everything", 2)


@pytest.fixture(scope="module")
def four() -> list[Found]:
    return together("tests.train.parallel.test_plans_loop:everything", 4, 400.0)


def compare(found: Found, case: str) -> None:
    own = {name.removeprefix(f"{case}:"): t for name, t in found.items() if name.startswith(f"{case}:")}
    want = steps(made(MODELS[case.rpartition("/")[2]], None))
    assert own.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(own[name], t, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{case} {n}: {m}")


@pytest.mark.parametrize("case", cases(ALONE))
def test_two_processes_compute_what_one_computes(two: list[Found], case: str) -> None:
    compare(two[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(PRODUCTS))
def test_four_processes_compute_what_one_computes(four: list[Found], case: str) -> None:
    compare(four[0], case)
