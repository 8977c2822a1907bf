"""AdamW against its paper, and which weights decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from assay.model.lm import build, weight_table
from assay.train.optim.adamw import adamw, load_state, set_rate, state_tensors
from assay.train.optim.groups import Group, groups
from assay.train.optim.specs import AdamWSpec
from tests.train.small import model


def by_the_paper(spec: AdamWSpec, w: np.ndarray, grads: list[np.ndarray], rates: list[float]) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, with the decay multiplied by the rate as torch does; float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    b1, b2 = spec.betas
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + spec.eps)
        w = w - rate * (step + spec.weight_decay * w)
    return w


@pytest.mark.parametrize("decay", [True, False])
def test_the_trajectory_is_the_papers(decay: bool) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 7)), [rng.normal(size=(5, 7)) for _ in range(12)]
    rates = [1e-2 * (i + 1) for i in range(12)]
    spec = AdamWSpec(lr=1.0, weight_decay=0.3)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = adamw(spec, [Group(decay, {"w": weight})])
    for grad, rate in zip(grads, rates, strict=True):
        weight.grad = torch.from_numpy(grad)
        set_rate(optimizer, rate)
        optimizer.step()
    expected = by_the_paper(spec if decay else AdamWSpec(lr=1.0, weight_decay=0.0), start, grads, rates)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)


def test_without_a_gradient_a_decayed_weight_shrinks_geometrically() -> None:
    spec = AdamWSpec(lr=0.05, weight_decay=0.2)
    pair = [torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64)) for _ in range(2)]
    optimizer = adamw(spec, [Group(True, {"a": pair[0]}), Group(False, {"b": pair[1]})])
    for _ in range(9):
        for parameter in pair:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(pair[0].detach(), torch.full((3,), 2.0 * (1 - 0.05 * 0.2) ** 9, dtype=torch.float64))
    assert (pair[1] == 2.0).all()


def test_matrices_decay_and_gains_and_tables_do_not() -> None:
    built = build(model(head={"kind": "lm", "tie": False}))
    found = groups(built, weight_table(built.spec))
    names = {group.decay: set(group.parameters) for group in found}
    assert names[False] == {n for n, p in built.named_parameters() if p.ndim == 1} | {"embed.weight"}
    assert "head.out.weight" in names[True] and "blocks.1.ffn.down.weight" in names[True]
    assert sum(len(g.parameters) for g in found) == len(list(built.parameters()))


def test_state_goes_out_and_in_by_name() -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        built = build(model(), seed=3)
        return built, adamw(AdamWSpec(), groups(built, weight_table(built.spec)))

    def step(built: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        for i, parameter in enumerate(built.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + i))
        optimizer.step()

    (a, first), (b, second) = fresh(), fresh()
    step(a, first, 0)
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.copy_(p)
    load_state(second, b, state_tensors(first, a))
    step(a, first, 100)
    step(b, second, 100)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="no weight of this model"):
        load_state(second, b, {"nonsense/exp_avg": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        load_state(second, b, {"embed.weight/exp_avg": torch.zeros(2, 2)})


def test_the_count_of_steps_goes_where_the_optimiser_keeps_it() -> None:
    """The fused kernel keeps it with the weights; a saved one comes back from the host."""
    for fused in (True, False):
        optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), fused=fused)
        model = torch.nn.Linear(2, 2, bias=False, device="meta")
        load_state(optimizer, model, {"weight/step": torch.tensor(3.0), "weight/exp_avg": torch.ones(2, 2)})
        state = optimizer.state[model.weight]
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == ("meta" if fused else "cpu")
