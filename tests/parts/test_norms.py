"""Norms beside torch's own, and the identities between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.parts.small import D, close, part, put, rows, x


@given(scale=st.floats(1e-3, 1e3))
def test_rmsnorm_ignores_scale(scale: float) -> None:
    norm = part("norms", "rmsnorm", eps=0.0).part
    close(norm(x() * scale), norm(x()), 1e-11)
    assert not torch.allclose(norm(-x()), norm(x()))


def test_layernorm_is_rmsnorm_of_what_is_left_without_the_mean() -> None:
    layer = part("norms", "layernorm", bias=False, weight=False, eps=1e-3).part
    rms = part("norms", "rmsnorm", weight="none", eps=1e-3).part
    close(layer(x()), rms(x() - x().mean(-1, keepdim=True)))


def test_layernorm_ignores_a_shift() -> None:
    layer, rms = part("norms", "layernorm").part, part("norms", "rmsnorm").part
    close(layer(x() + 7.5), layer(x()), 1e-11)
    assert not torch.allclose(rms(x() + 7.5), rms(x()))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_torch_has_the_same(eps: float) -> None:
    rms, layer = part("norms", "rmsnorm", eps=eps), part("norms", "layernorm", eps=eps)
    theirs = nn.RMSNorm(D, eps), nn.LayerNorm(D, eps)
    for mine, other in zip((rms, layer), theirs, strict=True):
        other.double().load_state_dict(mine.weights())
        close(mine.part(x()), other(x()))


def test_gemma_stores_the_weight_less_one() -> None:
    plus, one = part("norms", "rmsnorm", weight="plus_one"), part("norms", "rmsnorm")
    put(plus, weight=torch.zeros(D))
    put(one, weight=torch.ones(D))
    close(plus.part(x()), one.part(x()))
    put(plus, weight=torch.full((D,), 0.5))
    close(plus.part(x()), 1.5 * one.part(x()))


def test_half_precision_statistics_are_taken_in_float32() -> None:
    """Squares of 300 overflow float16, and their sum loses bfloat16's digits."""
    norm = part("norms", "rmsnorm", weight="none", eps=0.0).part
    wide = (x() * 300).half()
    assert wide.square().isinf().any()
    close(norm(wide).double(), norm(wide.double()), 1e-3)


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_batchnorm_is_torchs_with_its_running_statistics(momentum: float) -> None:
    mine = part("norms", "batchnorm", momentum=momentum)
    theirs = nn.BatchNorm1d(D, momentum=momentum).double()
    names = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    theirs.load_state_dict({names[n]: t for n, t in mine.weights().items()}, strict=False)
    for training in (True, True, False):
        for module in (mine.part, theirs):
            module.train(training)
        batch = x(12, 3 + training)
        close(mine.part(batch, rows(2, 6)), theirs(batch))
        close(mine.part.mean, theirs.running_mean)  # type: ignore[arg-type]
        close(mine.part.var, theirs.running_var)  # type: ignore[arg-type]


def test_batchnorm_leaves_padding_out() -> None:
    """Two of six tokens are padding: the statistics and the real outputs are those of the four others alone."""
    mine, alone = part("norms", "batchnorm"), part("norms", "batchnorm")
    step = rows(1, 6)
    step = step.with_(seq=torch.tensor([0, 0, -1, 0, 0, -1]))
    real = step.seq >= 0
    batch = torch.where(real[:, None], x(6), 1e3)
    close(mine.part(batch, step)[real], alone.part(batch[real], rows(1, 4)))
    close(mine.part.mean, alone.part.mean)
    close(mine.part.var, alone.part.var)
