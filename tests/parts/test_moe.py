"""The mixture of experts against dense networks and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.conform.cases import Case
from assay.ops.step import Step
from tests.parts.small import D, close, part, put, rows, x

STEP = rows(2, 6)


def moe(experts: int, k: int, **router: Any) -> Case:
    return part("ffns", "moe", experts=experts, width=8, router={"kind": "topk", "k": k, **router})


def dense(c: Case, expert: int) -> Case:
    """A gated network with one expert's weights."""
    made = part("ffns", "gated", width=8)
    w = c.weights()
    put(made, **{f"{name}__weight": w[name][expert] for name in ("gate", "up", "down")})
    return made


def identical(c: Case) -> Case:
    put(c, **{name: t[:1].expand_as(t) for name, t in c.weights().items() if "." not in name})
    return c


def test_one_expert_is_a_dense_network() -> None:
    c = moe(1, 1)
    close(c.run(x(), STEP), dense(c, 0).run(x(), STEP))


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (5, 3)])
def test_identical_experts_are_one(experts: int, k: int) -> None:
    """Shares that sum to one leave nothing of the routing; without renormalising they do not sum to one."""
    c = identical(moe(experts, k))
    close(c.run(x(), STEP), dense(c, 0).run(x(), STEP))
    scaled = identical(moe(experts, k, renormalise=False))
    assert not torch.allclose(scaled.run(x(), STEP), dense(scaled, 0).run(x(), STEP))


@pytest.mark.parametrize("renormalise", [True, False])
def test_all_experts_are_the_soft_mixture(renormalise: bool) -> None:
    c = moe(4, 4, renormalise=renormalise)
    p = torch.softmax(x() @ c.weights()["router.map.weight"].T, -1)
    close(c.run(x(), STEP), sum((p[:, e : e + 1] * dense(c, e).run(x(), STEP) for e in range(4)), torch.zeros(12, D)))


def test_tokens_do_not_know_their_place() -> None:
    c, order = moe(4, 2), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    close(c.run(x()[order], STEP), c.run(x(), STEP)[order])


def routed(c: Case, tokens: Tensor, step: Step = STEP) -> dict[str, Tensor]:
    c.part.train()
    taps: dict[str, Tensor] = {}
    c.run(tokens, step, taps=taps)
    return {name.removeprefix("part.router."): t for name, t in taps.items()}


def aimed(c: Case, experts: list[int], weight: float = 50.0) -> Tensor:
    """Tokens that go to these experts in turn: the router reads one coordinate an expert."""
    put(c, router__map__weight=torch.eye(len(set(c.weights()["gate"][:, 0, 0])), D) * weight)
    tokens = torch.zeros(len(experts), D, dtype=torch.float64)
    tokens[torch.arange(len(experts)), torch.tensor(experts)] = 1.0
    return tokens


def test_balance_loss_in_closed_form() -> None:
    """alpha E sum f P (2101.03961, eqs. 4-6): alpha when tokens and probabilities are uniform, alpha E collapsed."""
    c = moe(4, 1, balance=0.3)
    close(routed(c, aimed(c, [0, 1, 2, 3] * 3))["loss.balance"], torch.tensor(0.3, dtype=torch.float64))
    close(routed(c, aimed(c, [2] * 12))["loss.balance"], torch.tensor(1.2, dtype=torch.float64))
    assert routed(c, aimed(c, [2] * 9 + [0] * 3))["stat.load"].tolist() == [3.0, 0.0, 9.0, 0.0]


@pytest.mark.parametrize("k", [1, 2])
def test_balance_and_z_by_hand(k: int) -> None:
    c = moe(4, k, balance=0.3, z=0.2)
    told = routed(c, x())
    logits = x() @ c.weights()["router.map.weight"].T
    p = logits.softmax(-1)
    f = torch.bincount(p.topk(k).indices.flatten(), minlength=4).double() / (12 * k)
    close(told["loss.balance"], 0.3 * 4 * (f * p.mean(0)).sum())
    close(told["loss.z"], 0.2 * logits.exp().sum(-1).log().square().mean())
    assert "loss.z" not in routed(moe(4, k), x()) and "loss.balance" not in routed(moe(4, k, balance=0.0), x())


def test_the_share_of_choices_carries_no_gradient() -> None:
    """Only the mean probability does: the gradient is that of alpha E sum f P with f a constant."""
    c = moe(4, 2, balance=0.3)
    weight = c.part.get_parameter("router.map.weight")
    told = routed(c, x())
    (grad,) = torch.autograd.grad(told["loss.balance"], weight)
    f = told["stat.load"] / 24
    assert not told["stat.load"].requires_grad
    p = (x() @ weight.T).softmax(-1)
    (expected,) = torch.autograd.grad(0.3 * 4 * (f * p.mean(0)).sum(), weight)
    close(grad, expected)


def test_padding_is_counted_nowhere() -> None:
    c = moe(4, 2, balance=0.3, z=0.2)
    step = STEP.with_(seq=torch.tensor([0] * 4 + [-1] * 2 + [1] * 6))
    told, alone = routed(c, x(), step), routed(c, x()[step.seq >= 0], rows(1, 10))
    assert told.keys() == alone.keys() and told["stat.load"].sum() == 20
    for name in told:
        close(told[name], alone[name])


def test_parameters_total_and_active() -> None:
    """Three maps of D x width an expert, of which k / E act, and the router."""
    c = moe(4, 2)
    table = c.spec.weights(c.site).values()
    assert sum(w.numel for w in table) == 4 * 3 * D * 8 + 4 * D
    assert sum(w.numel * w.active for w in table) == 2 * 3 * D * 8 + 4 * D
    assert sum(w.flops for w in table) == 2 * (2 * 3 * D * 8 + 4 * D)
