"""Mixers by the delta rule: what they can count, what they share, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from assay.conform.cases import Case
from assay.conform.stored import feed, open_cache
from assay.parts.mixers import rwkv7
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.parts.small import D, close, part, put, rows, x

FIRST, ZERO, ONE = range(3)


def counter(negative: bool) -> Case:
    """One head of one channel. The first token writes 1; a one multiplies what is kept by 1 - beta, a zero by 1."""
    c = part("mixers", "deltanet", heads=1, head_dim=1, conv=None, negative=negative, chunk=16)
    maps = {name: torch.zeros(1, D, dtype=torch.float64) for name in ("q", "k", "v", "beta")}
    maps["q"][0, :3], maps["k"][0, :3], maps["v"][0, FIRST] = 1e4, 1e4, 1.0
    maps["beta"][0, ZERO], maps["beta"][0, ONE] = -1e3, 1e3
    out = torch.zeros(D, 1, dtype=torch.float64)
    out[0] = 1.0
    put(c, **{f"{name}__weight": m for name, m in maps.items()}, out__weight=out, norm__weight=torch.ones(1).double())
    return c


def said(c: Case, tokens: Tensor) -> Tensor:
    """The layer's first output after each token."""
    return c.run(torch.nn.functional.one_hot(tokens, D).double(), rows(1, len(tokens)))[:, 0]


@pytest.mark.parametrize("length", [7, 64, 1000])
def test_parity_needs_rates_up_to_two(length: int) -> None:
    """The sign is that of a product of 1 - beta = -1 for every one: the parity of the bits so far, however many. With
    rates up to one no factor is below 0, so the sign never changes (arXiv 2411.12537, theorem 1)."""
    bits = torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(length))
    tokens = torch.cat([torch.tensor([FIRST]), torch.where(bits == 1, ONE, ZERO)])
    read = said(counter(negative=True), tokens)
    assert torch.equal((read[1:] < 0).long(), bits.cumsum(0) % 2)
    assert read.abs().min() > 0.99
    assert bool((said(counter(negative=False), tokens) > -1e-12).all())  # what is 0 is so to the rounding of a sum


def test_two_steps_turn_where_one_cannot() -> None:
    """Two reflections make a rotation by a third of a turn, whose third power is the identity; one reflection is its
    own inverse (arXiv 2502.10297, section 4)."""
    c = part("mixers", "deltanet", heads=1, head_dim=2, value_dim=2, conv=None, negative=True, steps=2, chunk=8)
    third = torch.tensor(torch.pi / 3, dtype=torch.float64)
    keys = torch.tensor([1.0, 0.0, float(third.cos()), float(third.sin())], dtype=torch.float64)
    start = {name: torch.zeros(n, D, dtype=torch.float64) for name, n in (("q", 2), ("k", 4), ("v", 4), ("beta", 2))}
    far = 1e3  # SiLU is the identity there, and a length of 1000 hides the eps under its root
    start["q"][0, :3] = far
    start["k"][:, ONE], start["k"][2, FIRST] = far * keys, far
    start["v"][2, FIRST] = 1.0
    start["beta"][0, FIRST], start["beta"][:, ONE] = -far, far
    out = torch.zeros(D, 2, dtype=torch.float64)
    out[:2] = torch.eye(2)
    put(c, **{f"{name}__weight": m for name, m in start.items()}, out__weight=out, norm__weight=torch.ones(2).double())
    read = said(c, torch.tensor([FIRST, ONE, ONE, ONE, ONE, ONE, ONE]))
    close(read[3:], read[:4], 1e-5)
    assert read[0] > 0.5 and read[1] < 0 and read[2] < 0


def test_values_of_the_first_layer_are_taken() -> None:
    """Against the reference with the first layer's values; without them it is another layer."""
    small: dict[str, Any] = {"heads": 2, "ranks": {"decay": 3, "rate": 4, "value": 2, "gate": 5}, "chunk": 8}
    giver, taker = part("mixers", "rwkv7", gives="first", **small), part("mixers", "rwkv7", takes="first", **small)
    tokens, given = x(11), dict[str, Any]()
    giver.run(x(11, 2), rows(1, 11), given=given)
    mine = taker.run(tokens, rows(1, 11), given=dict(given))
    weights = taker.weights()
    close(mine, rwkv7.reference(taker.spec, weights, tokens, torch.arange(11), given["first"]), 1e-10)  # type: ignore[arg-type]
    alone = part("mixers", "rwkv7", **small)
    alone.part.load_state_dict(taker.part.state_dict(), strict=False)
    assert float((alone.run(tokens, rows(1, 11)) - mine).detach().abs().max()) > 1e-2


def model(**second: Any) -> dict[str, Any]:
    mixer = {"kind": "rwkv7", "heads": 2}
    blocks = {"a": {"mixer": {**mixer, "gives": "first"}}, "b": {"mixer": {**mixer, "takes": "first", **second}}}
    return {"d_model": 16, "vocab": 11, "layers": 2, "context": 8, "blocks": blocks, "pattern": ["a", "b"]}


def test_who_takes_needs_a_giver_of_its_shape() -> None:
    validate(ModelSpec, model(), "model")
    with pytest.raises(ValueError, match="no earlier layer gives 'other'; accepted: first"):
        validate(ModelSpec, model(takes="other"), "model")
    with pytest.raises(ValueError, match="`takes` 'first' with 4 heads of 4: its giver has others"):
        validate(ModelSpec, model(heads=4), "model")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("deltanet", {"heads": 3}, r"d_model \(32\) is not a multiple of `heads` \(3\)"),
        ("rwkv7", {"heads": 3}, r"d_model \(32\) is not a multiple of `heads` \(3\)"),
        ("gated_deltanet", {"heads": 4, "k_heads": 3}, r"`heads` \(4\) is not a multiple of `k_heads` \(3\)"),
        ("kda", {"heads": 2, "norm": "batchnorm"}, "`norm` 'batchnorm' mixes tokens; accepted: rmsnorm, layernorm"),
        ("rwkv7", {"heads": 2, "gives": "a", "takes": "b"}, "what is taken is not given again"),
        ("deltanet", {"heads": 2, "conv": 1}, "conv"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part("mixers", kind, **fields)


@pytest.mark.parametrize("kind", ["deltanet", "gated_deltanet", "kda", "rwkv7"])
def test_the_state_does_not_grow(kind: str) -> None:
    """What a sequence keeps after one token is what it keeps after many, and it depends on the first of them."""
    c = part("mixers", kind, heads=2)
    fields = c.spec.state(c.site)  # type: ignore[attr-defined]
    assert {f.per for f in fields} == {"sequence"}
    assert fields[0].shape == (2, 16, 16) and fields[0].bytes(10, "bfloat16") == fields[0].bytes(1, "bfloat16") == 2048
    last = []
    for other in (1, 2):
        cache, slots = open_cache(c, 1, 6)
        feed(c, cache, slots, x(6, other)[None], 0)
        last.append(feed(c, cache, slots, x(1, 3)[None], 6))
    assert float((last[0] - last[1]).detach().abs().max()) > 1e-3
