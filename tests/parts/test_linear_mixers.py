"""Mixers with a decay and an outer product: each against another form of itself, and against one another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.cache.cache import Cache
from assay.cache.size import Size
from assay.conform.cases import Case, noise, site_of
from assay.model.init import draw
from assay.ops.step import rows_step
from assay.spec import registry
from assay.spec.base import Site
from assay.spec.load import validate
from tests.model.small import spec as model_spec
from tests.ops.test_lanes import flat_step
from tests.parts.small import D, close, part, put, rows, x

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"heads": 2, "feature": "taylor", "features": 3, "chunk": 4},
    "retnet": {"heads": 2, "chunk": 4},
    "gla": {"heads": 2, "rank": 3, "temperature": 0.5, "chunk": 4},
    "lightning": {"heads": 2, "chunk": 4},
    "mamba2": {"heads": 4, "head_dim": 4, "groups": 2, "state_size": 5, "chunk": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_several_lengths_in_one_step(kind: str) -> None:
    """A prefill of 7, 1 and 4 tokens, then one of 2, 5 and 1 behind them: as each sequence alone."""
    c = part("mixers", kind, **KINDS[kind])
    first, more, order = [7, 1, 4], [2, 5, 1], [2, 0, 1]
    cache = Cache(c.fields, Size(3, 12, 8), torch.float64)
    slots = [cache.open() for _ in first]
    own = [noise((a + b, D), 20 + i) for i, (a, b) in enumerate(zip(first, more, strict=True))]
    found: list[list[Tensor]] = [[], [], []]
    for past, new in (([0, 0, 0], first), (first, more)):
        step = flat_step(past, new, 2, order)
        tokens = torch.cat([*(own[b][past[b] : past[b] + new[b]] for b in order), noise((2, D), 9)])
        y = c.run(tokens, step, cache.begin(slots, step))
        for b in range(3):
            found[b].append(y[step.seq == b])
    for b in range(3):
        close(torch.cat(found[b]), c.run(own[b], rows(1, len(own[b]))), 1e-5)


def placed(kind: str, fields: dict[str, Any], theta: float) -> Case:
    """A mixer under a RoPE, with the scheme as the case's part: both prepare."""
    site = replace(site_of(validate(registry.get("mixers", kind), {"kind": kind, **fields}, kind)), name="part")
    c = part("mixers", kind, **fields)
    rope = registry.get("positions", "rope").model_validate({"kind": "rope", "theta": theta})
    scheme = rope.build(replace(site, name="scheme"))
    c.part.bind({"here": scheme})
    return Case(rope, site, scheme, c.part)


def test_retention_is_its_parallel_form() -> None:
    """(Q K^T * D) V with Q and K turned as complex numbers (2307.08621, eqs. 3-5), norm and gate."""
    fields = {"heads": 2, "head_dim": 6, "value_dim": 5, "position": "here", "chunk": 4}
    c, n = placed("retnet", fields, 50.0), 12
    w = {name: p.detach() for name, p in c.mixer.named_parameters()}
    q, k = ((x() @ w[f"{name}.weight"].T).view(n, 2, 6) for name in "qk")
    angle = torch.arange(n)[:, None] * 50.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    q, k = (torch.complex(t[..., :3], t[..., 3:]) * turn for t in (q, k))
    scores = torch.einsum("ihk,jhk->hij", q, k.conj()).real / 6**0.5
    away = torch.arange(n)[:, None] - torch.arange(n)
    gamma = torch.tensor([31 / 32, 63 / 64], dtype=torch.float64)[:, None, None]
    mix = torch.einsum(
        "hij,jhv->ihv", scores * (gamma ** away.clamp(min=0)).tril(), (x() @ w["v.weight"].T).view(n, 2, 5)
    )
    y = F.layer_norm(mix, (5,), eps=1e-5).flatten(1) * F.silu(x() @ w["gate_map.weight"].T)
    close(c.run(x(), rows(1, n)), y @ w["out.weight"].T, 1e-6)  # the angles are float32


def test_gates_that_say_the_same_to_every_token_are_retention() -> None:
    """GLA with a constant gate of RetNet's rates computes what RetNet does."""
    norm = {"kind": "layernorm", "weight": False, "bias": False}
    ret = part("mixers", "retnet", heads=2, head_dim=4, value_dim=6, chunk=4)
    gla = part("mixers", "gla", heads=2, key_dim=4, value_dim=6, rank=3, norm=norm, chunk=4)
    gamma = torch.tensor([31 / 32, 63 / 64], dtype=torch.float64).repeat_interleave(4)
    same = {f"{n}__weight": ret.weights()[f"{n}.weight"] for n in ("q", "k", "v", "gate_map", "out")}
    put(gla, **same, decay_up__weight=torch.zeros(8, 3), decay_up__bias=torch.logit(gamma**16))
    close(gla.run(x(), rows(2, 6)), ret.run(x(), rows(2, 6)), 1e-10)


def test_taylor_features_are_softmax_to_the_second_order() -> None:
    """Halved queries bring linear attention eight times nearer to softmax attention."""
    gqa, linear = part("mixers", "gqa", heads=2), part("mixers", "linear", heads=2, feature="taylor", chunk=5)
    far = []
    for scale in (0.1, 0.05):
        same = {f"{n}__weight": gqa.weights()[f"{n}.weight"].clone() for n in ("q", "k", "v", "out")}
        same["q__weight"] *= scale / same["q__weight"].abs().max() / 10
        put(linear, **same)
        kept = gqa.weights()["q.weight"].clone()
        put(gqa, q__weight=same["q__weight"])
        far.append(float((gqa.run(x(), rows(2, 6)) - linear.run(x(), rows(2, 6))).detach().abs().max()))
        put(gqa, q__weight=kept)
    assert 1e-12 < far[1] < far[0] / 6


def test_a_query_without_a_feature_is_answered_with_zero() -> None:
    """relu leaves nothing of a negative query: the output and all gradients stay finite."""
    c = part("mixers", "linear", heads=2, feature="relu", chunk=4)
    put(c, q__weight=-torch.eye(D).double())
    tokens = x().abs().requires_grad_()
    y = c.run(tokens, rows(2, 6))
    assert not y.any()
    for grad in torch.autograd.grad((y * noise(tuple(y.shape), 3)).sum(), [tokens, *c.part.parameters()]):
        assert grad.isfinite().all()


def test_mamba2_starts_where_its_authors_do() -> None:
    """exp(A_log) evenly in (1, 16), softplus(dt_bias) evenly in its logarithm in (0.001, 0.1)."""
    spec: Any = registry.get("mixers", "mamba2").model_validate({"kind": "mamba2", "heads": 4000, "head_dim": 1})
    table = spec.own(Site(d_in=2000))
    rates, steps = (draw(table[n].init, table[n].shape, 0, n) for n in ("A_log", "dt_bias"))
    place = (rates.exp() - 1) / 15, (F.softplus(steps).log() / torch.tensor(10.0).log() + 3) / 2
    for found in place:
        even = (torch.arange(4000) + 0.5) / 4000
        assert (found.sort().values - even).abs().max() < 0.03


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("linear", {"heads": 2, "feature": "identity"}, "accepted: normalise: false"),
    ("linear", {"heads": 3}, "give `head_dim`"),
    ("gla", {"heads": 2, "chunk": 12}, "`chunk`: 12; accepted: a power of two"),
    ("gla", {"heads": 3, "value_dim": 4}, "give `key_dim`"),
    ("gla", {"heads": 2, "norm": "batchnorm"}, "mixes tokens; accepted: rmsnorm, layernorm"),
    ("retnet", {"heads": 2, "norm": "batchnorm"}, "mixes tokens; accepted: rmsnorm, layernorm"),
    ("lightning", {"heads": 5}, "give `head_dim`"),
    ("mamba2", {"head_dim": 24}, "give `heads`"),
    ("mamba2", {"heads": 3, "groups": 2}, "3 heads are not a multiple of `groups`"),
]


@pytest.mark.parametrize(("kind", "fields", "told"), WRONG)
def test_what_cannot_be_honoured_is_refused(kind: str, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        part("mixers", kind, **fields)


def test_bounds_of_time_steps_are_in_order() -> None:
    for dt, told in (({"low": 0.2}, "not below `high`"), ({"at_least": 1.0, "at_most": 0.5}, "not below `at_most`")):
        with pytest.raises(ValueError, match=told):
            part("mixers", "mamba2", heads=2, dt=dt)


@pytest.mark.parametrize("scheme", ["alibi", {"kind": "rope", "turns": "read"}])
def test_retention_takes_no_scheme_that_needs_scores(scheme: Any) -> None:
    tree = {"kind": "alibi", "heads": 2} if scheme == "alibi" else scheme
    with pytest.raises(ValueError, match="accepted: null, or a scheme of kind rope with `turns: write`"):
        model_spec({"mixer": {"kind": "retnet", "heads": 2, "position": "p"}}, positions={"p": tree})
    with pytest.raises(ValueError, match="is not a scheme of this stack"):
        alone = part("mixers", "retnet", heads=2, position="p")
        alone.run(x(), rows_step(torch.zeros(2, 6, dtype=torch.long)))
