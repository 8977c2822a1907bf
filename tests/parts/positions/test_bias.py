"""ALiBi and T5: their tables against transformers, and biases that depend on distances alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from assay.model.lm import build
from assay.ops.step import rows_step
from assay.parts.positions import alibi, t5
from assay.parts.positions._distance import DistancePosition
from assay.parts.positions.alibi import Alibi, alibi_bias, slopes
from assay.parts.positions.t5 import T5, bucket
from assay.spec.base import Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec


def test_slopes_are_a_geometric_series() -> None:
    for heads in (1, 2, 8, 16):
        expected = [2 ** (-8 * i / heads) for i in range(1, heads + 1)]
        assert slopes(heads).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 12, 20, 25, 112])
def test_slopes_equal_transformers(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert torch.allclose(slopes(heads), theirs, rtol=1e-6, atol=0)


def test_a_bias_by_distance_and_one_by_key_give_one_softmax() -> None:
    """-m (i - j) and +m j differ by a constant of the row (Press et al., section 3)."""
    heads, length = 6, 9
    z = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(0))
    i = torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    by_key = slopes(heads)[:, None, None] * i
    a, b = ((z + bias).masked_fill(~seen, float("-inf")).softmax(-1) for bias in (alibi_bias(heads, i, i), by_key))
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 12), (64, 500)])
def test_buckets_equal_transformers(buckets: int, reach: int, bidirectional: bool) -> None:
    spec = T5(heads=1, buckets=buckets, max_distance=reach, bidirectional=bidirectional)
    distance = torch.arange(-3 * reach, 3 * reach + 1)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional, buckets, reach)
    assert torch.equal(bucket(spec, distance), theirs)
    weights = {"weight": torch.arange(buckets, dtype=torch.float64)[:, None]}
    own = t5.reference(spec, weights, distance.clamp(min=0), torch.tensor([0]), 1)[0, :, 0]
    assert torch.equal(own.long(), bucket(spec, distance.clamp(min=0)))


def scheme(kind: str) -> tuple[DistancePosition, Tensor]:
    """A built scheme for six heads, and its reference's bias for some queries and keys."""
    q_pos, k_pos = torch.tensor([4, 5, 40]), torch.tensor([0, 3, 5, 39])
    if kind == "alibi":
        return Alibi(heads=6).build(Site()).double(), alibi.reference(Alibi(heads=6), {}, q_pos, k_pos, 6)
    spec = T5(heads=6, buckets=8, max_distance=20, bidirectional=True)
    part = spec.build(Site()).double()
    torch.nn.init.normal_(part.weight, generator=torch.Generator().manual_seed(0))
    return part, t5.reference(spec, {"weight": part.weight.detach()}, q_pos, k_pos, 6)


@pytest.mark.parametrize("kind", ["alibi", "t5"])
def test_tiles_equal_the_reference(kind: str) -> None:
    part, bias = scheme(kind)
    q_pos, k_pos = torch.tensor([4, 5, 40]), torch.tensor([0, 3, 5, 39])
    z, q = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.zeros(2, 6, 3, 8, dtype=torch.float64)
    expected = (z + bias).detach()
    rows = q_pos.expand(2, 1, 3), k_pos.expand(2, 1, 4)
    for places in (rows, (rows[0][:, 0], rows[1][:, 0]), (q_pos, k_pos)):
        assert torch.allclose(part.tile(z, q, *places), expected, rtol=0, atol=1e-7)
    assert torch.allclose(part.tile(z[0], q[0], q_pos[None], k_pos[None]), expected[0], rtol=0, atol=1e-7)
    assert torch.allclose(part.by_distance(q_pos[:, None] - k_pos).double(), bias, rtol=0, atol=1e-7)


@pytest.mark.parametrize("position", [{"kind": "alibi", "heads": 2}, {"kind": "t5", "heads": 2, "buckets": 8}])
def test_scores_do_not_move_with_the_text(position: dict[str, object]) -> None:
    """A model with a relative bias gives the same logits wherever the positions start, and other logits without it."""
    tree = {
        "d_model": 16,
        "vocab": 13,
        "layers": 2,
        "context": 12,
        "init": {"std": 0.5},
        "positions": {"here": position},
        "blocks": {
            "b": {"mixer": {"kind": "gqa", "heads": 2, "position": "here"}, "ffn": {"kind": "gated", "width": 24}}
        },
    }
    model = build(validate(ModelSpec, tree, "test")).double()
    step = rows_step(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))
    plain = model(step).logits
    assert torch.allclose(model(step.with_(positions=step.positions + 1000)).logits, plain, rtol=0, atol=1e-12)
    assert not torch.allclose(model(step.with_(positions=step.positions * 0)).logits, plain, atol=1e-4)
    tree["positions"] = {"here": position | {"heads": 4}}
    with pytest.raises(ValueError, match="`heads: 4`, but the layer has 2 query heads"):
        validate(ModelSpec, tree, "test")


def test_the_bias_of_t5_learns() -> None:
    part, _ = scheme("t5")
    d = torch.tensor([0, 0, 1, -7])
    part.by_distance(d).sum().backward()
    uses = torch.bincount(bucket(part.spec, d), minlength=8).double()
    assert torch.equal(part.weight.grad, uses[:, None].expand(8, 6))


@pytest.mark.parametrize(
    "fields", [{"buckets": 7}, {"buckets": 6, "bidirectional": True}, {"buckets": 32, "max_distance": 16}]
)
def test_buckets_that_do_not_divide_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="`buckets`"):
        T5(heads=2, **fields).check(Site())  # type: ignore[arg-type]
