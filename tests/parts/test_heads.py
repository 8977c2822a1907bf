"""Heads of masked language models, of whole sequences, and a bias beside a tied table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.engine.runner import right_padded
from assay.ops.step import Step, rows_step
from assay.parts.heads._pool import pool
from assay.parts.heads.lm import LossOptions
from tests.parts.small import noise, part

D, V = 32, 11
LENGTHS = [4, 1, 7]


def head(kind: str, **fields: Any) -> Any:
    return part("heads", kind, **fields).part


def padded() -> tuple[Step, Tensor]:
    """Three sequences of unequal length, with noise in the padding."""
    step = right_padded([[1] * n for n in LENGTHS], [0] * 3, LENGTHS, torch.device("cpu")).with_(emit=None)
    return step, noise((step.tokens, D), 2)


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_leaves_padding_out(how: str) -> None:
    step, h = padded()
    rows = [row[:n] for row, n in zip(h.view(3, 7, D), LENGTHS, strict=True)]
    expected = [{"first": row[0], "last": row[-1], "mean": row.mean(0)}[how] for row in rows]
    assert torch.allclose(pool(h, step, how), torch.stack(expected), rtol=1e-12)  # type: ignore[arg-type]
    flat, zeros = torch.cat(rows), torch.zeros(3, dtype=torch.long)
    packed = rows_step(torch.zeros(1, 12, dtype=torch.long)).with_(
        seq=torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)),
        starts=torch.tensor([0, 4, 5, 12]),
        past=zeros,
        horizon=zeros,
    )
    assert torch.allclose(pool(flat, packed, how), torch.stack(expected), rtol=1e-12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all 21 tokens, and `emit` left 3"):
        pool(h[:3], step, how)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalise", [True, False])
def test_pooled(normalise: bool) -> None:
    step, h = padded()
    found = head(kind="pooled", pool="first", normalise=normalise)(h, step, h)
    first = h.view(3, 7, D)[:, 0]
    assert torch.allclose(found, first / first.norm(dim=1, keepdim=True) if normalise else first, rtol=1e-12)
    with pytest.raises(ValueError, match="'pooled' has no loss"):
        head(kind="pooled").loss(h, h[:, 0].long(), step, h, None)


def test_the_loss_of_a_classifier() -> None:
    """A label at each first token; a sequence without one counts nothing."""
    made, (step, h) = head(kind="classify", labels=3, pool="mean"), padded()
    targets = torch.full((step.tokens,), -1)
    targets[0], targets[14] = 2, 1
    z = made(h, step, h)[[0, 2]]
    log_p = z - z.exp().sum(1, keepdim=True).log()
    nll = -(log_p[0, 2] + log_p[1, 1])
    found = made.loss(h, targets, step, h, LossOptions(smoothing=0.3))
    assert found["count"] == 2 and torch.allclose(found["nll"], nll, rtol=1e-12)
    assert torch.allclose(found["objective"], 0.7 * nll - 0.3 * log_p.mean(1).sum(), rtol=1e-12)
    with pytest.raises(ValueError, match="no z-loss"):
        made.loss(h, targets, step, h, LossOptions(z=0.1))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "classify", "labels": 3},
        {"kind": "classify", "labels": 3, "act": None, "pool": "last"},
        {"kind": "mlm"},
        {"kind": "mlm", "tie": False},
        {"kind": "lm", "tie": True, "bias": True},
    ],
)
def test_cost_is_what_the_counter_counts(fields: dict[str, Any]) -> None:
    c = part("heads", **fields)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        c.part(noise((9, D), 1), rows_step(torch.zeros(1, 9, dtype=torch.long)), noise((V, D), 1))
    told, linears = c.spec.cost(c.site, 9, 0), 9 * sum(w.flops for w in c.spec.weights(c.site).values())
    assert counter.get_total_flops() == linears + told.flops == linears + told.executed


def test_a_bias_beside_a_tied_table() -> None:
    h, table = noise((5, D), 2), noise((V, D), 1)
    step = rows_step(torch.zeros(1, 5, dtype=torch.long))
    made = head(kind="lm", tie=True, bias=True, scale=0.5, softcap=2.0)
    expected = 2.0 * torch.tanh(0.5 * (h @ table.T + made.bias) / 2.0)
    assert torch.allclose(made(h, step, table), expected, rtol=1e-12)


def test_masked_tokens_alone_are_learned() -> None:
    """The loss of a masked language model is over the tokens with a target, as `F.cross_entropy` has it."""
    h, table = noise((6, D), 2), noise((V, D), 1)
    step = rows_step(torch.zeros(1, 6, dtype=torch.long))
    made = head(kind="mlm", act="relu")
    x = F.layer_norm(F.relu(h @ made.dense.weight.T + made.dense.bias), (D,), made.norm.weight, made.norm.bias)
    z = x @ table.T + made.bias
    found = made.loss(h, torch.tensor([-1, 4, -1, -1, 7, -1]), step, table, None)
    assert torch.allclose(found["nll"], F.cross_entropy(z[[1, 4]], torch.tensor([4, 7]), reduction="sum"))
    assert found["count"] == 2


def test_norms_that_mix_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="`norm` 'batchnorm' mixes tokens"):
        head(kind="classify", labels=2, norm="batchnorm")
