"""Where the norm stands decides how signal and gradient travel: the stack at initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.model.lm import LM
from assay.ops.step import rows_step
from assay.parts.residuals.post import Post
from assay.spec.base import Site
from tests.model.small import VOCAB, made

LAYERS = 12


def stack(place: str, gain: float = 1.0, seed: int = 0, **block: Any) -> LM:
    """Twelve layers 64 wide, every matrix drawn with `gain` / 8, no depth scaling; 1 is the fan-in of most."""
    inner = {
        "mixer": {"kind": "gqa", "heads": 4},
        "ffn": {"kind": "dense", "width": 256, "act": "relu"},
        "norm": {"place": place},
        **block,
    }
    init = {"std": "fan_in" if gain == 1.0 else gain / 8, "embed": 1.0, "depth": False}
    return made(inner, seed, d_model=64, layers=LAYERS, init=init).train()


def ids() -> Tensor:
    return torch.randint(0, VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def variances(lm: LM) -> list[float]:
    """Mean square of the stream at the input, then after every layer."""
    taps = lm(rows_step(ids(), listen=frozenset(["*.in", "*.out"]))).taps
    stream = [taps["blocks.0.in"], *(taps[f"blocks.{i}.out"] for i in range(LAYERS))]
    return [float(h.square().mean()) for h in stream]


def gradients(lm: LM) -> list[float]:
    """Norm of the gradient of each layer's second feed-forward map, in the mean over tokens."""
    out = lm(rows_step(ids()), targets=ids().flatten().roll(-1)).loss
    assert out is not None
    (out["nll"] / 256).backward()
    return [float(lm.get_parameter(f"blocks.{i}.ffn.down.weight").grad.norm()) for i in range(LAYERS)]  # type: ignore[union-attr]


def test_pre_norm_variance_grows_with_depth() -> None:
    """Each branch adds about the same, so the growth a layer is steady (2002.04745, lemma 2)."""
    told = torch.tensor([variances(stack("pre", seed=seed)) for seed in range(4)]).mean(0)
    growth = told[1:] - told[:-1]
    assert float(growth.min()) > 0 and 0.5 < float(growth[:6].mean() / growth[6:].mean()) < 2
    assert float(torch.corrcoef(torch.stack([torch.arange(LAYERS + 1.0), told]))[0, 1]) > 0.99


def test_post_norm_variance_stays_one() -> None:
    assert all(math.isclose(v, 1.0, rel_tol=1e-4) for v in variances(stack("post"))[1:])


def test_gradients_by_depth() -> None:
    """Post-norm: larger towards the top. Pre-norm: flat or falling (2002.04745, theorem 1 and figure 3).

    Drawn at twice the fan-in, so that a branch outweighs the stream; at once the fan-in post-norm is flat here too.
    """
    post, pre = gradients(stack("post", 2.0)), gradients(stack("pre", 2.0))
    lower, upper = (lambda g: sum(g[:4]) / 4), (lambda g: sum(g[-4:]) / 4)
    assert upper(post) > 2 * lower(post) and upper(pre) < 1.2 * lower(pre)


def test_deepnorm_table() -> None:
    """2203.00555, table 1, decoder-only: alpha = (2 N)^(1/4), beta = (8 N)^(-1/4)."""
    site = Site(layers=12)
    deep, plain = Post(deep=True), Post()
    assert math.isclose(deep.alpha(site), 2.2133638, rel_tol=1e-7) and plain.alpha(site) == 1.0
    for name, beta in (("v", 0.31947), ("out", 0.31947), ("up", 0.31947), ("down", 0.31947), ("q", 1.0), ("k", 1.0)):
        assert math.isclose(deep.gain(f"{name}.weight", site), beta, rel_tol=1e-4)
        assert plain.gain(f"{name}.weight", site) == 1.0


def test_deepnorm_keeps_the_lower_layers_learning() -> None:
    """Its gradients differ less between top and bottom than plain post-norm's do."""
    deep = gradients(stack("post", 2.0, residual={"kind": "post", "deep": True}))
    post = gradients(stack("post", 2.0))
    assert max(deep) / min(deep) < max(post) / min(post)


@pytest.mark.parametrize("parallel", ["own", "shared"])
def test_a_parallel_block_is_its_sum(parallel: str) -> None:
    """y = x + A(n(x)) + F(m(x)), with m = n where the norm is shared."""
    lm = made({"parallel": parallel, "mixer": {"kind": "linear", "heads": 2}, "scale": 0.5}, layers=1)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "norm" in name:
                p.copy_(torch.linspace(0.5, 2.0, p.numel()) * (1.0 if "mixer" in name else 1.7))
    taps = lm(step := rows_step(ids()[:1], listen=frozenset(["*.in", "*.out"]))).taps
    block, x = lm.blocks[0], taps["blocks.0.in"]
    norms = (block.norm0, block.norm0) if parallel == "shared" else (block.mixer_norm, block.ffn_norm)
    alone = made({"ffn": None, "mixer": {"kind": "linear", "heads": 2}}, layers=1)
    alone.blocks[0].mixer.load_state_dict(block.mixer.state_dict())
    alone.blocks[0].mixer_norm.load_state_dict(norms[0].state_dict())
    states = alone._stateless(step)
    a = alone.blocks[0](x, {}, step.with_(tables=alone._tables(step, states)), states)[0] - x
    w, m = block.ffn, norms[1](x)
    f = (torch.nn.functional.silu(m @ w.gate.weight.T) * (m @ w.up.weight.T)) @ w.down.weight.T
    assert torch.allclose(taps["blocks.0.out"], x + 0.5 * (a + f), rtol=0, atol=1e-12)
