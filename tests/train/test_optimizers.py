"""Optimisers against their papers, written again in float64, and against torch's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.model.lm import build, weight_table
from assay.spec.base import Role, Weight
from assay.spec.load import change, digest, validate
from assay.train.checkpoint import read_run, stored_weights
from assay.train.loop import train
from assay.train.optim.adafactor import Adafactor
from assay.train.optim.base import Given
from assay.train.optim.groups import Group
from assay.train.optim.lion import Lion
from assay.train.optim.muon import QUINTIC, Muon, orthogonal
from assay.train.optim.schedule_free import ScheduleFree, shown
from assay.train.optim.soap import Soap
from assay.train.optim.specs import (
    OPTIMIZERS,
    AdafactorSpec,
    AdamWSpec,
    LionSpec,
    MuonSpec,
    OptimizerSpec,
    ScheduleFreeSpec,
    SoapSpec,
    is_hidden,
)
from assay.train.recipe import Recipe
from tests.train.small import learner, model, recipe
from tests.train.test_optim import by_the_paper
from tests.train.test_resume import EVERY, same, stop_at

Array = np.ndarray[Any, np.dtype[np.float64]]
RATES = [1e-2 * (i % 3 + 1) for i in range(8)]
ROLES: dict[str, Role] = {"w": "matrix", "e": "embed"}
KINDS = [kind for kind in OPTIMIZERS if kind != "adamw"]


def gradients(*shape: int) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(0)
    return rng.normal(size=shape), [rng.normal(size=shape) for _ in RATES]


def taken(make: Any, spec: OptimizerSpec, start: Array, grads: list[Array], role: Role = "matrix") -> Array:
    """Where the optimiser takes a weight that is declared with this role."""
    weight = torch.nn.Parameter(torch.tensor(start))
    table = {"w": Weight(start.shape, role)}
    optimizer = make(spec, Given([Group(True, {"w": weight})], table))
    for grad, rate in zip(grads, RATES, strict=True):
        weight.grad = torch.tensor(grad)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    with shown(optimizer):
        return weight.detach().numpy().copy()


def close(found: Array, want: Array) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)


def muon_by_the_paper(spec: MuonSpec, w: Array, grads: list[Array]) -> Array:
    """The iteration acts on singular values alone: p(s) = a s + b s^3 + c s^5, `steps` times."""
    m = np.zeros_like(w)
    a, b, c = QUINTIC
    for g, rate in zip(grads, RATES, strict=True):
        m = spec.momentum * m + (1 - spec.momentum) * g
        ahead = spec.momentum * m + (1 - spec.momentum) * g
        u, s, vt = np.linalg.svd(ahead, full_matrices=False)
        s = s / math.sqrt(float((s**2).sum()))
        for _ in range(spec.steps):
            s = a * s + b * s**3 + c * s**5
        w = w - rate * (0.2 * math.sqrt(max(w.shape)) * (u * s) @ vt + spec.weight_decay * w)
    return w


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_muon_is_the_papers(shape: tuple[int, int]) -> None:
    spec, (start, grads) = MuonSpec(weight_decay=0.3), gradients(*shape)
    close(taken(Muon, spec, start, grads), muon_by_the_paper(spec, start, grads))


def test_muon_takes_each_expert_by_itself() -> None:
    spec, (start, grads) = MuonSpec(), gradients(3, 6, 10)
    alone = [muon_by_the_paper(spec, start[i], [g[i] for g in grads]) for i in range(3)]
    close(taken(Muon, spec, start, grads, "expert"), np.stack(alone))


def test_muon_moves_as_torchs_does() -> None:
    """torch iterates in bfloat16, whose products are good to about a hundredth."""
    start, grads = gradients(12, 20)
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    theirs = torch.optim.Muon([weight], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad, rate in zip(grads, RATES, strict=True):
        weight.grad = torch.tensor(grad, dtype=torch.float32)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    moved, ours = weight.detach().double().numpy() - start, taken(Muon, MuonSpec(), start, grads) - start
    assert np.linalg.norm(moved - ours) < 0.03 * np.linalg.norm(moved)


def test_updates_of_muon_are_nearly_orthogonal() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)), 5))
    assert values.min() > 0.6 and values.max() < 1.25


@pytest.mark.parametrize("make", [(Muon, MuonSpec()), (Soap, SoapSpec(betas=(0.9, 0.95)))])
def test_what_is_no_hidden_matrix_gets_adamw(make: tuple[Any, Any]) -> None:
    """A table beside a matrix, which has to be there."""
    start, grads = gradients(5, 7)
    table = {n: Weight((5, 7), r) for n, r in ROLES.items()}
    pair = {name: torch.nn.Parameter(torch.tensor(start)) for name in table}
    optimizer = make[0](make[1], Given([Group(True, pair)], table))
    for grad, rate in zip(grads, RATES, strict=True):
        for p in pair.values():
            p.grad = torch.tensor(grad)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    want = by_the_paper(AdamWSpec(weight_decay=make[1].weight_decay), start, grads, RATES)
    close(pair["e"].detach().numpy(), want)
    assert np.abs(pair["w"].detach().numpy() - want).max() > 1e-3


def test_lion_is_the_papers() -> None:
    spec, (start, grads) = LionSpec(weight_decay=0.3), gradients(5, 7)
    w, m, (b1, b2) = start, np.zeros_like(start), spec.betas
    for g, rate in zip(grads, RATES, strict=True):
        w = w - rate * (np.sign(b1 * m + (1 - b1) * g) + spec.weight_decay * w)
        m = b2 * m + (1 - b2) * g
    close(taken(Lion, spec, start, grads), w)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (9,)])
def test_adafactor_is_torchs(shape: tuple[int, ...]) -> None:
    start, grads = gradients(*shape)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.Adafactor([weight], weight_decay=0.1, foreach=False)
    for grad, rate in zip(grads, RATES, strict=True):
        weight.grad = torch.tensor(grad)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    close(taken(Adafactor, AdafactorSpec(), start, grads), weight.detach().numpy())


def test_soap_is_the_papers() -> None:
    """Algorithms 3 and 4, one side after the other; the first basis is that of the first gradient, by the same routine:
    where it has fewer rows than columns, some directions are anybody's choice. eps is larger than what rounding leaves
    of a gradient in those."""
    spec, (w, grads) = SoapSpec(every=3, weight_decay=0.3, eps=1e-3), gradients(5, 7)
    m, v, (b1, b2) = np.zeros_like(w), np.zeros_like(w), spec.betas
    left, right = np.zeros((5, 5)), np.zeros((7, 7))
    first = torch.tensor(grads[0])
    ql, qr = (torch.linalg.eigh(square)[1].numpy() for square in (first @ first.T, first.T @ first))
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        turned = (ql.T @ m @ qr / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + spec.eps)
        w = w - rate * (ql @ turned @ qr.T + spec.weight_decay * w)
        left, right = (spec.side * p + (1 - spec.side) * q for p, q in ((left, g @ g.T), (right, g.T @ g)))
        if t % spec.every == 0:
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
    close(taken(Soap, spec, *gradients(5, 7)), w)


def test_schedule_free_is_the_papers() -> None:
    """Algorithm 1, with x stored; the weights that are shown are x."""
    spec, (z, grads) = ScheduleFreeSpec(weight_decay=0.3), gradients(5, 7)
    x, v, total, (b1, b2) = z, np.zeros_like(z), 0.0, spec.betas
    for t, (g, rate) in enumerate(zip(grads, RATES, strict=True), 1):
        y = (1 - b1) * z + b1 * x
        v = b2 * v + (1 - b2) * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - b2**t)) + spec.eps) + spec.weight_decay * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
    close(taken(ScheduleFree, spec, *gradients(5, 7)), x)


def how(kind: str, **more: Any) -> Recipe:
    """Of a rate that SOAP's second basis has a say in."""
    chosen = {"kind": kind} | ({"every": 3} if kind == "soap" else {})
    return recipe(optimizer=chosen, schedule={"kind": "constant" if kind == "schedule_free" else "wsd"}, **more)


MIXED = model(blocks={"b": {
    "mixer": {"kind": "gqa", "heads": 2, "position": "rope"},
    "ffn": {"kind": "moe", "experts": 3, "width": 8},
}})  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_is_as_large_as_foreseen(kind: str) -> None:
    one = learner(MIXED, how(kind))
    one.step(0, 8)
    kept = sum(t.nbytes for state in one.optimizer.state.values() for t in state.values() if t.dim())
    table = weight_table(MIXED)
    assert kept == sum(4 * one.recipe.optimizer.keeps(w, w) for w in table.values()) == one.need().moments
    assert {is_hidden(w) for w in table.values()} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    """Also where it was saved between two weights that are shown and trained."""
    whole = train(MIXED, how(kind), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(MIXED, how(kind), tmp_path / "cut", on_progress=stop_at(5), options=EVERY)
    rest = train(MIXED, how(kind), tmp_path / "cut", resume=True)
    assert same(rest, whole) and rest.losses == whole.losses and rest.valid_losses == whole.valid_losses
    assert whole.losses[-1][1] < whole.losses[0][1]


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    """At the end of a run: x of the definition, from z and y as they are in the save."""
    found = train(model(), how("schedule_free"), tmp_path)
    saved, weights = read_run(tmp_path), stored_weights(tmp_path, model())
    assert saved is not None
    for name, p in found.model.named_parameters():
        y, z = (saved.tensors[f"optimizer/{name}/{key}"] for key in ("trained", "fast"))
        assert torch.equal(weights[name], p) and not torch.equal(y, p)
        torch.testing.assert_close(0.9 * p.detach() + 0.1 * z, y)


def test_an_optimiser_has_a_digest_of_its_own() -> None:
    made = [build_of(kind) for kind in OPTIMIZERS]
    assert len({digest(one) for one in made}) == len(OPTIMIZERS)
    for one in made:
        assert digest(validate(Recipe, one.model_dump(), "recipe")) == digest(one)
    assert digest(change(Recipe(), {"optimizer": {"kind": "adamw"}})) == digest(Recipe())


def build_of(kind: str) -> Recipe:
    chosen: dict[str, Any] = {"optimizer": {"kind": kind, "lr": 1e-3, "weight_decay": 0.1, "lr_width": 64}}
    return validate(Recipe, chosen | ({"schedule": {"kind": "constant"}} if kind == "schedule_free" else {}), "recipe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind: 'adam'; accepted: adamw, muon, lion, adafactor, soap"),
        ({"optimizer": {"kind": "lion", "eps": 1.0}}, "optimizer.eps: unknown field; accepted: kind, lr"),
        ({"optimizer": {"kind": "schedule_free"}}, "schedule.kind: cosine; .* accepted: constant"),
        ({"optimizer": {"kind": "muon", "betas": [0.9, 1.0]}}, "betas: .0.9, 1.0.; accepted: two numbers"),
    ],
)
def test_what_is_no_optimiser_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(Recipe, changes, "recipe")


def test_a_mesh_that_cannot_hold_it_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"soap: parallel.shard=2 is not supported, since its bases .* shard=1"):
        SoapSpec().check({"data": 2, "shard": 2})
    SoapSpec().check({"data": 2, "context": 2})
    MuonSpec().check({"shard": 2, "tensor": 2})


def test_a_model_without_matrices_is_refused() -> None:
    made = build(model())
    with pytest.raises(ValueError, match="muon; no matrix is trained"):
        Muon(MuonSpec(), Given([Group(False, {"embed.weight": made.embed.table()})], weight_table(made.spec)))  # type: ignore[dict-item]
