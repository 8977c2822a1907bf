"""Mixers against torch's own and against what the papers say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from assay.cache import Cache, Size
from assay.conform.cases import MEMORY, Case
from tests.parts.small import D, close, part, put, rows, x

STEP = rows(2, 6)
HEARS = frozenset(["*"])


def gqa(**fields: Any) -> Case:
    return part("mixers", "gqa", heads=4, **fields)


def logits(c: Case, tokens: Tensor) -> Tensor:
    """[R, H, T, T] from the queries and keys that the mixer publishes."""
    taps: dict[str, Tensor] = {}
    c.run(tokens, STEP.with_(listen=HEARS), taps=taps)
    q, k = (taps[f"part.{n}"].view(2, 6, 4, -1).transpose(1, 2) for n in ("q", "k"))
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


@given(scale=st.floats(1e-2, 1e3))
def test_qk_norm_bounds_the_logits(scale: float) -> None:
    """|q.k| / sqrt(K) <= max|g_q| max|g_k| sqrt(K), whatever the size of the maps (2302.05442, section 2)."""
    c = gqa(qk_norm={"norm": {"kind": "rmsnorm", "eps": 0.0}})
    w = c.weights()
    before = logits(c, x()).detach()
    bound = float(w["q_norm.weight"].abs().max() * w["k_norm.weight"].abs().max()) * 8**0.5
    put(c, q__weight=w["q.weight"] * scale, k__weight=w["k.weight"] / scale * 7)
    close(logits(c, x()), before, 1e-10)
    assert float(before.abs().max()) <= bound * (1 + 1e-12)
    plain = gqa()
    small = logits(plain, x())
    put(plain, q__weight=plain.weights()["q.weight"] * 1e4)
    close(logits(plain, x()), small * 1e4, 1e-8)


def attended(c: Case, tokens: Tensor, change: Any, causal: bool = True) -> Tensor:
    """softmax(change(logits)) v by hand, with the mixer's own maps."""
    w = c.weights()
    q, k, v = ((tokens @ w[f"{n}.weight"].T).view(2, 6, 4, 8).transpose(1, 2) for n in ("q", "k", "v"))
    z = change(q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    if "sink" in w:
        z = torch.cat([z, w["sink"].view(1, 4, 1, 1).expand(2, 4, 6, 1)], -1)
    mix = z.softmax(-1)[..., :6] @ v
    return mix.transpose(1, 2).reshape(12, -1) @ w["out.weight"].T


def test_plain_scores_are_torchs() -> None:
    c = gqa()
    close(c.run(x(), STEP), attended(c, x(), lambda z: z))


def test_soft_cap() -> None:
    """cap * tanh(z / cap) (Gemma 2); a wide cap is none."""
    capped, wide = gqa(scores={"softcap": 1.5}), gqa(scores={"softcap": 1e6})
    close(capped.run(x(), STEP), attended(capped, x(), lambda z: 1.5 * torch.tanh(z / 1.5)))
    close(wide.run(x(), STEP), gqa().run(x(), STEP), 1e-9)
    assert not torch.allclose(capped.run(x(), STEP), gqa().run(x(), STEP))


def test_sink() -> None:
    """One more logit in every softmax, without a value; at -30 it takes nothing, at +30 everything."""
    c = gqa(scores={"sink": True})
    close(c.run(x(), STEP), attended(c, x(), lambda z: z))
    put(c, sink=torch.full((4,), -30.0))
    close(c.run(x(), STEP), gqa().run(x(), STEP), 1e-9)
    put(c, sink=torch.full((4,), 30.0))
    assert float(c.run(x(), STEP).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("gate", ["element", "head"])
def test_an_open_gate_is_no_gate(gate: str) -> None:
    """sigmoid(0) = 1/2 halves everything; a large input opens it."""
    c, plain = gqa(gate=gate), gqa()
    shape = c.weights()["gate_map.weight"].shape
    put(c, gate_map__weight=torch.zeros(shape))
    close(c.run(x(), STEP), 0.5 * plain.run(x(), STEP))
    put(c, gate_map__weight=torch.full(shape, 100.0))
    positive = x().abs()
    close(c.run(positive, STEP), plain.run(positive, STEP))


def test_cross_attention_is_torchs() -> None:
    c = part("mixers", "cross", heads=4, d_memory=20, bias=True)
    theirs = nn.MultiheadAttention(D, 4, kdim=20, vdim=20, batch_first=True).double()
    w = c.weights()
    names = {f"{n}_proj_weight": w[f"{n}.weight"] for n in "qkv"}
    names |= {"in_proj_bias": torch.cat([w[f"{n}.bias"] for n in "qkv"])}
    theirs.load_state_dict({**names, **{f"out_proj.{n}": w[f"out.{n}"] for n in ("weight", "bias")}})
    memory = c.memory(2)
    assert memory is not None
    h = memory.h.view(2, MEMORY, 20)
    close(c.run(x(), c.step(2, 6)), theirs(x().view(2, 6, D), h, h)[0].flatten(0, 1), 1e-10)


@pytest.mark.parametrize("normalise", [True, False])
def test_linear_attention_is_its_sum(normalise: bool) -> None:
    """o_i = sum_{j <= i} (phi(q_i).phi(k_j)) v_j, over the same sum of weights (2006.16236, eq. 9)."""
    c = part("mixers", "linear", heads=2, normalise=normalise)
    w = c.weights()
    q, k, v = ((x() @ w[f"{n}.weight"].T).view(2, 6, 2, 16) for n in ("q", "k", "v"))
    phi = [torch.where(t > 0, t + 1, t.exp()) for t in (q, k)]
    weight = torch.einsum("bihk,bjhk->bhij", *phi).tril()
    weight = weight / weight.sum(-1, keepdim=True) if normalise else weight
    mix = torch.einsum("bhij,bjhv->bihv", weight, v).flatten(2).flatten(0, 1)
    close(c.run(x(), STEP), mix @ w["out.weight"].T)


def test_linear_attention_remembers_the_same_whatever_the_length() -> None:
    """The state has no token axis, and after n tokens it is the sum of their outer products."""
    c = part("mixers", "linear", heads=2)
    assert all(f.entries(10) == f.entries(10_000) == 1 for f in c.spec.state(c.site))
    sizes = {Cache(c.fields, Size(1, n), torch.float32).reserved_bytes() for n in (1, 10, 1000)}
    assert sizes == {4 * 2 * (16 * 16 + 16)}
    store = Cache(c.fields, Size(1, 8, 8), torch.float64)
    step = rows(1, 8)
    c.run(x(8), step, store.begin([store.open()], step))
    w = c.weights()
    k, v = ((x(8) @ w[f"{n}.weight"].T).view(8, 2, 16) for n in ("k", "v"))
    k = torch.where(k > 0, k + 1, k.exp())
    pools = {f.name: t[0].double() for f, t in store.tensors()}
    close(pools["s"], torch.einsum("nhk,nhv->hkv", k, v), 1e-6)
    close(pools["z"], k.sum(0), 1e-6)
