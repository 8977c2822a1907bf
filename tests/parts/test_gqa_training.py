"""Grouped-query attention in training mode and outside it: dropout, and what both softmax mixers publish."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from assay.conform.cases import MEMORY, Case
from assay.spec.load import digest
from tests.parts.small import close, part, rows, x

STEP = rows(2, 6)


def gqa(**scores: Any) -> Case:
    return part("mixers", "gqa", heads=4, scores=scores)


def run(c: Case, seed: int, training: bool = True) -> Tensor:
    c.modules.train(training)
    torch.manual_seed(seed)
    return c.run(x(), STEP)


def test_dropout_is_for_training_and_follows_the_seed() -> None:
    c, plain = gqa(dropout=0.5), gqa()
    assert torch.equal(run(c, 1, training=False), run(plain, 2, training=False))
    assert torch.equal(run(c, 1), run(c, 1)) and not torch.allclose(run(c, 1), run(c, 2))
    assert torch.equal(run(gqa(dropout=0.0), 1), run(plain, 2))
    assert digest(c.spec) != digest(plain.spec) == digest(gqa(dropout=0.0).spec)


def test_a_rate_outside_its_range_is_refused() -> None:
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"scores\.dropout"):
            gqa(dropout=rate)


def test_recomputed_in_the_backward_pass_drops_the_same() -> None:
    grads = []
    for again in (False, True):
        c, tokens = gqa(dropout=0.5, softcap=2.0), x().requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(lambda t, c=c: c.run(t, STEP), tokens, use_reentrant=False) if again else c.run(tokens, STEP)
        grads.append(torch.autograd.grad(y.sin().sum(), tokens)[0])
    close(*grads)


def published(c: Case, length: int) -> dict[str, Tensor]:
    taps: dict[str, Tensor] = {}
    c.run(x(), c.step(2, 6).with_(listen=frozenset(["part.scores", "part.probs"])), taps=taps)
    assert taps["part.scores"].shape == taps["part.probs"].shape == (12, 4, length)
    return {name.removeprefix("part."): value.view(2, 6, 4, length).transpose(1, 2) for name, value in taps.items()}


def test_scores_are_those_of_the_maps() -> None:
    c = gqa(scale=0.3, softcap=1.5)
    w, taps = c.weights(), published(c, 6)
    q, k = ((x() @ w[f"{n}.weight"].T).view(2, 6, 4, 8).transpose(1, 2) for n in "qk")
    z = 1.5 * torch.tanh(0.3 * q @ k.transpose(-1, -2) / 1.5)
    z = z.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(taps["scores"], z, atol=1e-12, rtol=0)
    close(taps["probs"], z.softmax(-1))


def test_cross_attention_publishes_the_same() -> None:
    c = part("mixers", "cross", heads=4, kv_heads=2, d_memory=20)
    w, taps, memory = c.weights(), published(c, MEMORY), c.memory(2)
    assert memory is not None
    q = (x() @ w["q.weight"].T).view(2, 6, 4, 8).transpose(1, 2)
    k = (memory.h @ w["k.weight"].T).view(2, MEMORY, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    z = q @ k.transpose(-1, -2) / 8**0.5
    close(taps["scores"], z)
    close(taps["probs"], z.softmax(-1))
