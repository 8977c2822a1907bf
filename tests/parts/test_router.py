"""Scores, groups and biases of the router against Hugging Face's routers, closed forms and worked examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from assay.conform.cases import Case, noise
from assay.ops.here import Here
from tests.parts.small import D, close, part, put, rows, x
from tests.train.small import learner, model

STEP = rows(2, 6)


def router(k: int = 2, **fields: Any) -> Case:
    """For six experts."""
    return part("routers", "topk", k=k, **fields)


def routed(c: Case, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """choice and share [N, k]."""
    with torch.no_grad():
        choice, share = c.part(tokens, rows(1, len(tokens)), Here("part", {}, {}, {}, frozenset()))
    return choice, share


def spread(choice: Tensor, share: Tensor) -> Tensor:
    """[N, E]: the share of each expert, zero where it was not chosen."""
    return torch.zeros(choice.shape[0], 6, dtype=share.dtype).scatter(1, choice, share)


SIZES: dict[str, Any] = {"hidden_size": D, "n_routed_experts": 6, "num_experts_per_tok": 2, "topk_group": 2}


@pytest.mark.parametrize("renormalise", [True, False])
def test_equals_deepseek_v3(renormalise: bool) -> None:
    """Sigmoids, the best two of each group, a bias that selects, shares that sum to one or do not, scaled."""
    groups = {"count": 3, "top": 2, "score": "top2"}
    c = router(score="sigmoid", groups=groups, select_bias=True, renormalise=renormalise, scale=2.5)
    put(c, select_bias=torch.tensor([0.1, -0.05, 0.0, 0.08, -0.1, 0.03]))
    other = router(score="sigmoid", groups={**groups, "score": "max"}, select_bias=True)
    put(other, select_bias=c.weights()["select_bias"])
    assert not torch.equal(routed(c, x(200))[0].sort().values, routed(other, x(200))[0].sort().values)
    how = {"n_group": 3, "norm_topk_prob": renormalise, "routed_scaling_factor": 2.5}
    theirs = DeepseekV3TopkRouter(hf.DeepseekV3Config(**SIZES, **how))
    with torch.no_grad():
        theirs.weight.copy_(c.weights()["map.weight"])
        theirs.e_score_correction_bias.copy_(c.weights()["select_bias"])
        _, share, choice = theirs(x(200).float())
    close(spread(*routed(c, x(200))), spread(choice, share.double()), 1e-5)


def test_equals_deepseek_v2() -> None:
    """Softmax, and a group counts by its best expert."""
    c = router(groups={"count": 3, "top": 2, "score": "max"}, renormalise=False, scale=3.0)
    how = {"n_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}
    theirs = DeepseekV2TopkRouter(hf.DeepseekV2Config(**SIZES, **how))
    with torch.no_grad():
        theirs.weight.copy_(c.weights()["map.weight"])
        _, share, choice = theirs(x(200).float())
    close(spread(*routed(c, x(200))), spread(choice, share.double()), 1e-5)


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("score", ["max", "top2"])
def test_experts_of_a_token_span_few_groups(top: int, score: str) -> None:
    c = router(groups={"count": 3, "top": top, "score": score}, score="sigmoid", select_bias=True)
    choice, _ = routed(c, x(300))
    spans = [len(set(row)) for row in (choice // 2).tolist()]
    assert max(spans) == top and choice.shape == (300, 2)


def test_all_groups_are_no_groups() -> None:
    """With every group open, and with one open, the free choice is changed in the second case alone."""
    free, everything, one = (router(groups=g) for g in (None, *({"count": 3, "top": t} for t in (3, 1))))
    assert torch.equal(spread(*routed(free, x(100))), spread(*routed(everything, x(100))))
    assert not torch.equal(routed(free, x(100))[0], routed(one, x(100))[0])


def test_renormalised_softmax_is_the_softmax_of_the_chosen() -> None:
    """The two orders in use: shares of all experts made to sum to one, and top-k before the softmax (gpt-oss)."""
    c = router(k=3, bias=True)
    logits = x(50) @ c.weights()["map.weight"].T + c.weights()["map.bias"]
    best = logits.topk(3, -1)
    close(spread(*routed(c, x(50))), spread(best.indices, best.values.softmax(-1)))


def test_a_selection_bias_only_selects() -> None:
    """Shares are the scores without it; zero changes nothing; a large one brings its expert to every token."""
    free, biased = router(renormalise=False), router(renormalise=False, select_bias=True)
    put(biased, select_bias=torch.zeros(6))
    assert torch.equal(spread(*routed(free, x())), spread(*routed(biased, x())))
    put(biased, select_bias=torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0]))
    choice, share = routed(biased, x())
    scores = (x() @ free.weights()["map.weight"].T).softmax(-1)
    assert (choice == 3).any(1).all() and not (routed(free, x())[0] == 3).any(1).all()
    close(share, scores.gather(1, choice))


def test_no_gradient_moves_a_selection_bias() -> None:
    c = router(select_bias=True)
    bias = c.part.get_parameter("select_bias")
    _, share = c.part(x(), STEP, Here("part", {}, {}, {}, frozenset()))
    assert share.requires_grad and not bias.requires_grad
    bias.requires_grad_()
    assert torch.autograd.grad(share.square().sum(), [bias], allow_unused=True)[0] is None


def test_a_selection_bias_follows_the_load() -> None:
    """2408.15664, algorithm 1: up by the rate under the mean load, down over it, still at the mean."""
    c = router(select_bias={"rate": 0.25})
    put(c, select_bias=torch.zeros(6))
    c.part.after({"stat.load": torch.tensor([4.0, 0.0, 9.0, 4.0, 3.0, 4.0])})
    assert c.weights()["select_bias"].tolist() == [0.0, 0.25, -0.25, 0.0, 0.25, 0.0]
    c.part.after({})
    assert c.weights()["select_bias"].tolist() == [0.0, 0.25, -0.25, 0.0, 0.25, 0.0]


@pytest.mark.parametrize(("rate", "least", "most"), [(0.01, 0.0, 0.1), (0.0, 1.5, 2.0)])
def test_a_selection_bias_evens_a_skewed_router(rate: float, least: float, most: float) -> None:
    """A router that does not learn and favours two experts: largest load over the mean, less one, after 200 steps."""
    c = router(score="sigmoid", select_bias={"rate": rate}, bias=True)
    put(c, select_bias=torch.zeros(6), map__bias=torch.tensor([3.0, 3.0, 0.0, -1.0, 0.0, -2.0]))
    tokens = noise((600, D), 4)
    for _ in range(200):
        load = torch.bincount(routed(c, tokens)[0].flatten(), minlength=6).double()
        c.part.after({"stat.load": load})
    violation = float(load.max() / load.mean() - 1)
    assert least <= violation <= most, load


def test_training_moves_a_selection_bias_by_its_rate() -> None:
    """One optimiser step of the training loop: each expert by the rate, up or down, against its load of that step."""
    router = {"kind": "topk", "k": 1, "select_bias": {"rate": 0.125}, "balance": 0.0}
    ffn = {"kind": "moe", "experts": 4, "width": 8, "router": router}
    mixer = {"kind": "gqa", "heads": 2, "position": "rope"}
    made = learner(model(blocks={"b": {"mixer": mixer, "ffn": ffn}}))
    loads: list[Tensor] = []
    place = made.model.get_submodule("blocks.1.ffn.router")
    place.after = lambda taps, after=place.after: (loads.append(taps["stat.load"]), after(taps))  # type: ignore
    made.step(0, 4)
    assert loads[0].sum() == 4 * 16
    expected = 0.125 * torch.sign(loads[0].mean() - loads[0])
    assert torch.equal(place.get_parameter("select_bias"), expected) and expected.abs().max() > 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_balance_of_uniform_scores(score: str) -> None:
    """E sum f P is one where every probability is 1 / E, whatever is chosen, for either score."""
    c = router(score=score, balance=0.3)
    put(c, map__weight=torch.zeros(6, D))
    taps: dict[str, Tensor] = {}
    c.part.train()
    c.run(x(), STEP, taps=taps)
    close(taps["part.loss.balance"], torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"k": 7}, ["`k` (7)", "6 experts"]),
        ({"groups": {"count": 4, "top": 1}}, ["`groups.count` (4)", "6 experts"]),
        ({"groups": {"count": 3, "top": 4}}, ["`groups.top` (4)", "3 groups"]),
        ({"k": 3, "groups": {"count": 3, "top": 1}}, ["`k` (3)", "2 experts"]),
        ({"groups": {"count": 6, "top": 3}}, ["top2", "accepted here: max"]),
        ({"norm": "batchnorm"}, ["'batchnorm'", "rmsnorm, layernorm"]),
    ],
)
def test_refusals(fields: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ValueError) as told:
        part("routers", "topk", **fields)
    assert all(word in str(told.value) for word in says), told.value
