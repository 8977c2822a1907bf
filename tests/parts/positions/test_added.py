"""Schemes that are added to the embedding, and what a model without any can and cannot tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.model.lm import build, weight_table
from assay.ops.step import rows_step
from assay.parts.base import Position
from assay.parts.positions import learned, onehot, sinusoidal
from assay.parts.positions.learned import Learned
from assay.parts.positions.onehot import OneHot
from assay.parts.positions.sinusoidal import Sinusoidal, encode
from assay.spec.base import PositionSpec, Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec

SITE = Site("positions.here", 0, 1, 16, 16, (), 16)


def built(spec: PositionSpec, site: Site = SITE) -> Position:
    part: Position = spec.build(site).double()
    for p in part.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    return part


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (learned, Learned()),
        (learned, Learned(max=40)),
        (onehot, OneHot(scale=0.5)),
        (sinusoidal, Sinusoidal()),
        (sinusoidal, Sinusoidal(theta=50.0, scale=0.3)),
    ],
)
def test_parts_equal_their_reference(module: Any, spec: PositionSpec) -> None:
    part, step = built(spec), rows_step(torch.zeros(2, 5, dtype=torch.long), past=7)
    x = torch.randn(10, 16, dtype=torch.float64)
    weights = {name: p.detach() for name, p in part.named_parameters()}
    expected = module.reference(spec, weights, x, step.positions)
    assert torch.allclose(part.on_embed(x, step), expected, rtol=0, atol=1e-12)


def test_a_shift_of_sinusoids_is_one_linear_map() -> None:
    """PE(p + k) = M_k PE(p) with M_k block-diagonal rotations that know nothing of p (Vaswani et al., section 3.5)."""
    dim, k = 16, 13
    p = torch.arange(50)
    angle = k * 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    blocks = [torch.tensor([[a.cos(), a.sin()], [-a.sin(), a.cos()]], dtype=torch.float64) for a in angle]
    shift = torch.block_diag(*blocks)
    assert torch.allclose(encode(p + k, dim), encode(p, dim) @ shift.T, rtol=0, atol=1e-12)
    assert torch.equal(encode(torch.tensor([0]), 4), torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("spec", [Learned(), Learned(max=16), OneHot()])
def test_a_position_past_the_end_raises(spec: PositionSpec) -> None:
    part, x = built(spec), torch.zeros(1, 16, dtype=torch.float64)
    last, past = (rows_step(torch.zeros(1, 1, dtype=torch.long), past=n) for n in (15, 16))
    assert part.on_embed(x, last).abs().max() > 0
    with pytest.raises(ValueError, match=f"{spec.kind_name()} positions: position 16 is past the table, which has 16"):
        part.on_embed(x, past)
    with pytest.raises(ValueError, match="is past the table"):  # a step whose maker did not say how far it goes
        part.on_embed(x, past.with_(reach=None))


def test_the_bound_is_read_on_the_host() -> None:
    """On the meta device no value exists, so a comparison of values would raise: shapes and the refusal still work."""
    part = Learned().build(SITE).to("meta")
    x, step = torch.zeros(4, 16, device="meta"), rows_step(torch.zeros(1, 4, dtype=torch.long, device="meta"), past=3)
    assert part.on_embed(x, step).shape == (4, 16)
    with pytest.raises(ValueError, match="position 20"):
        part.on_embed(x, step.with_(reach=21))


def tree(position: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    mixer = {"kind": "gqa", "heads": 2, "sees": {"causal": changes.pop("causal", True)}}
    return {
        "d_model": 16,
        "vocab": 13,
        "layers": 2,
        "context": 12,
        "init": {"std": 0.5},
        "positions": {} if position is None else {"here": position},
        "blocks": {"b": {"mixer": mixer, "ffn": {"kind": "gated", "width": 24}}},
        **changes,
    }


def shuffled_difference(position: dict[str, Any] | None, causal: bool) -> float:
    """How far the outputs of permuted tokens are from the permuted outputs."""
    model = build(validate(ModelSpec, tree(position, causal=causal), "test")).double()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])

    def logits(ids: Tensor) -> Tensor:
        out = model(rows_step(ids)).logits
        assert out is not None
        return out.detach()

    return float((logits(ids[:, order]) - logits(ids)[order]).abs().max())


def test_without_positions_only_causality_tells_order() -> None:
    """Bidirectional: permutation-equivariant. Causal: not (Haviv et al. 2022, arXiv 2203.16634)."""
    assert shuffled_difference(None, causal=False) < 1e-12
    assert shuffled_difference(None, causal=True) > 1e-3
    for kind in ("sinusoidal", "learned", "onehot"):
        assert shuffled_difference({"kind": kind}, causal=False) > 1e-3


@pytest.mark.parametrize(
    ("position", "changes", "said"),
    [
        ({"kind": "learned", "max": 8}, {}, r"learned positions end at 8 \(`max`\), but the model's `context` is 12"),
        ({"kind": "onehot"}, {"context": 17}, r"onehot positions end at 16 \(`d_model`\)"),
        ({"kind": "sinusoidal"}, {"d_model": 15}, "must be even"),
    ],
)
def test_a_model_that_cannot_be_honoured_is_refused(
    position: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        validate(ModelSpec, tree(position, **changes), "test")


def test_the_table_is_declared_and_looked_up() -> None:
    table = weight_table(validate(ModelSpec, tree({"kind": "learned"}), "test"))
    weight = table["positions.here.weight"]
    assert weight.shape == (12, 16) and weight.flops == 0
