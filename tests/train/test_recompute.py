"""What is computed again in the backward pass changes no gradient, and less is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.train.learner import NLL, Learner
from assay.train.memory import SavedForBackward
from tests.train.small import learner, model, recipe

GQA: dict[str, Any] = {"kind": "gqa", "heads": 2, "position": "rope", "scores": {"dropout": 0.2}}
MOE: dict[str, Any] = {"kind": "moe", "experts": 4, "width": 8, "router": {"kind": "topk", "balance": 0.5}}
DELTA: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2, "head_dim": 8}
SPEC = model(
    layers=3,
    pattern=["d", "a", "c"],
    blocks={
        "d": {"mixer": DELTA, "dropout": 0.1},
        "a": {"mixer": GQA, "ffn": MOE, "dropout": 0.1},
        "c": {"like": "blocks.1"},
    },
)


def gradients(one: Learner) -> tuple[dict[str, Tensor], Tensor, int]:
    """Of one batch, with its stats, and bytes that were kept."""
    sums = {NLL: torch.zeros(())}
    batch = next(one.loader)
    torch.manual_seed(7)
    with SavedForBackward(one.model) as saved:
        one._objective(batch, batch.counted, sums).backward()
    load = torch.cat([v.reshape(-1) for name, v in sums.items()])
    return {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}, load, saved.bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_and_taps_are_those_of_the_plain_run(how: str, precision: str) -> None:
    plain, plain_sums, all_kept = gradients(learner(SPEC, recipe(precision=precision)))
    found, sums, kept = gradients(learner(SPEC, recipe(precision=precision, recompute=how)))
    assert found.keys() == plain.keys() and torch.equal(sums, plain_sums)
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert kept < all_kept


def test_full_multiplies_again_and_selective_does_not() -> None:
    flops = {}
    for how in ("none", "selective", "full"):
        one = learner(SPEC, recipe(recompute=how))
        with FlopCounterMode(display=False) as counter:
            gradients(one)
        flops[how] = counter.get_total_flops()
    again = {how: count - flops["none"] for how, count in flops.items()}
    assert 0.1 * flops["none"] < again["full"] < 0.5 * flops["none"]
    assert again["selective"] < 0.1 * again["full"]  # what a scan's own operator multiplies is not seen inside it


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="recompute"):
        recipe(recompute="most")
