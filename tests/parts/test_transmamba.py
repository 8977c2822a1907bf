"""Attention and a state space with the same maps, against the parts that are one of the two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from assay.spec import registry
from assay.spec.base import Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.parts.small import close, part, put, rows, x

SIZES = {"heads": 4, "head_dim": 6}


def test_before_the_switch_it_is_attention() -> None:
    c, full = part("mixers", "transmamba", **SIZES, switch=7), part("mixers", "gqa", **SIZES)
    put(full, **{f"{n}__weight": c.weights()[f"{n}.weight"] for n in ("q", "k", "v", "out")})
    mine, theirs = c.run(x(), rows(1, 12)), full.run(x(), rows(1, 12))
    close(mine[:7], theirs[:7], 1e-10)
    assert all(not torch.allclose(a, b) for a, b in zip(mine[7:], theirs[7:], strict=True))


def test_behind_the_switch_it_is_the_quadratic_form_of_a_state_space() -> None:
    """Dao and Gu 2024, arXiv 2405.21060, equation 16: y = (L o q k^T) (dt v) with L_ij the product of the decays."""
    c, tokens = part("mixers", "transmamba", **SIZES, switch=3), x()
    w = c.weights()
    q, k, v = ((tokens @ w[f"{n}.weight"].T).view(12, 4, 6).transpose(0, 1) for n in ("q", "k", "v"))
    dt = F.softplus(tokens @ w["dt.weight"].T + w["dt_bias"]).T
    since = (-w["A_log"].exp()[:, None] * dt).cumsum(-1)
    fade = (since[:, :, None] - since[:, None]).exp().tril()
    y = (fade * (q @ k.mT)) @ (dt[..., None] * v) + w["D"][:, None, None] * v
    y = F.rms_norm(y, (6,), w["norm.weight"], 1e-6).transpose(0, 1).flatten(1) @ w["out.weight"].T
    close(c.run(tokens, rows(1, 12))[3:], y[3:], 1e-10)


def test_positions_turn_the_attention_alone() -> None:
    c = part("mixers", "transmamba", **SIZES, switch=5, position="p")
    made = registry.get("positions", "rope").model_validate({"kind": "rope"}).build(Site("positions.p"))
    c.part.bind({"p": made})
    plain = part("mixers", "transmamba", **SIZES, switch=5)
    turned, still = c.run(x(), rows(1, 12)), plain.run(x(), rows(1, 12))
    close(turned[5:], still[5:])
    assert not torch.allclose(turned[:5], still[:5])


@pytest.mark.parametrize(("new", "seen"), [(12, 0), (1, 3), (1, 9), (4, 6), (6, 4)])
def test_the_bill(new: int, seen: int) -> None:
    """Pairs before the switch, a write for every token, a read behind it."""
    spec = registry.get("mixers", "transmamba").model_validate({"kind": "transmamba", **SIZES, "switch": 7})
    places = range(seen, seen + new)
    pairs, late = sum(i + 1 for i in places if i < 7), sum(i >= 7 for i in places)
    assert spec.cost(Site(), new, seen).flops == 4 * 4 * 6 * pairs + 2 * 4 * 6 * 6 * (new + late)


def test_what_is_remembered_stops_at_the_switch() -> None:
    spec = registry.get("mixers", "transmamba").model_validate({"kind": "transmamba", **SIZES, "switch": 7})
    assert [(f.entries(5), f.entries(100)) for f in spec.state(Site())] == [(5, 7), (5, 7), (1, 1)]


def test_schemes_that_turn_on_reading_are_refused() -> None:
    mixer = {"kind": "transmamba", "heads": 4, "position": "p"}
    tree = {
        "d_model": 32,
        "vocab": 11,
        "layers": 1,
        "context": 16,
        "positions": {"p": {"kind": "rope", "turns": "read"}},
    }
    with pytest.raises(ValueError, match="transmamba needs a scheme with `turns: write`"):
        validate(ModelSpec, {**tree, "blocks": {"b": {"mixer": mixer}}}, "here")
