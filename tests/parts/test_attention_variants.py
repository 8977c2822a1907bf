"""Talking heads and differential attention beside plain attention and their papers' own formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.cache import Cache, Size
from assay.conform.cases import Case, noise, randomise
from assay.cost.bill import Question, bill
from assay.model.lm import state_table
from assay.ops.step import rows_step
from assay.parts.mixers.diff_attention import DiffAttention, reference
from assay.spec.base import Site
from tests.model.small import ids, logits, made, spec
from tests.parts.small import D, close, part, put, rows, x

STEP = rows(2, 6)
KINDS = ("talking_heads", "diff_attention")
FIELDS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2, "head_dim": 6, "bias": "all", "gate": "element"},
    {"scores": {"sink": True, "softcap": 2.0, "temperature": {"gain": 0.7, "every": 3}}, "sees": {"window": 4}},
    {"qk_norm": {}, "values": {"tied": True, "norm": "rmsnorm"}},
    {"scores": {"dropout": 0.4}},
]


def alike(c: Case, plain: Case) -> None:
    """The weights of `plain` for `c`, which has more."""
    put(c, **{name.replace(".", "__"): w for name, w in plain.weights().items()})


def seeded(c: Case) -> Tensor:
    torch.manual_seed(0)  # dropout draws the same
    return c.run(x(), STEP)


def heads(c: Case, tokens: Tensor) -> tuple[Tensor, ...]:
    """q, k, v as [R, H, T, K] of rows of 6 tokens and 4 heads."""
    w = c.weights()
    return tuple((tokens @ w[f"{n}.weight"].T).view(2, 6, 4, 8).transpose(1, 2) for n in "qkv")


LATER = torch.ones(6, 6).triu(1).bool()


@pytest.mark.parametrize("fields", FIELDS)
def test_heads_that_only_hear_themselves_are_plain_attention(fields: dict[str, Any]) -> None:
    c, plain = part("mixers", "talking_heads", heads=4, **fields), part("mixers", "gqa", heads=4, **fields)
    alike(c, plain)
    expected = seeded(plain)
    assert not torch.allclose(seeded(c), expected)
    put(c, on_logits=torch.eye(4), on_probs=torch.eye(4))
    close(seeded(c), expected, 1e-12)


def test_talking_heads_as_the_paper_writes_them() -> None:
    """Section 4's lines (2003.02436) with as many heads for keys, softmax and values; its maps stand the other way."""
    c = part("mixers", "talking_heads", heads=4)
    w, (q, k, v) = c.weights(), heads(c, x())
    raw = torch.einsum("bhnk,bhmk->bnmh", q, k) / 8**0.5
    talked = torch.einsum("bnmh,hg->bnmg", raw, w["on_logits"].T).masked_fill(LATER[..., None], -torch.inf)
    weights = torch.einsum("bnmg,gj->bnmj", talked.softmax(2), w["on_probs"].T)
    mix = torch.einsum("bnmj,bjmv->bnjv", weights, v).reshape(12, -1)
    close(c.run(x(), STEP), mix @ w["out.weight"].T)


def test_heads_that_hear_one_alone_look_where_it_looks() -> None:
    """A map before the softmax whose rows are alike gives all heads the logits of one."""
    c = part("mixers", "talking_heads", heads=4)
    only = torch.zeros(4, 4)
    only[:, 2] = 1.0
    put(c, on_logits=only, on_probs=torch.eye(4))
    q, k, v = heads(c, x())
    p = (q[:, 2] @ k[:, 2].mT / 8**0.5).masked_fill(LATER, -torch.inf).softmax(-1)
    mix = (p[:, None] @ v).transpose(1, 2).reshape(12, -1)
    close(c.run(x(), STEP), mix @ c.weights()["out.weight"].T)


def test_differential_attention_as_the_paper_writes_it() -> None:
    """Appendix A of 2410.05258: two maps of half the size, values of the whole."""
    c = part("mixers", "diff_attention", heads=4)
    w, (q, k, v) = c.weights(), heads(c, x())
    a = (q @ k.mT / 8**0.5).masked_fill(LATER, -torch.inf).softmax(-1)
    less = (w["lambda_q"] * w["lambda_k"]).sum(-1).exp()
    values = torch.cat([v[:, 0::2], v[:, 1::2]], -1)
    mix = (a[:, 0::2] - (less[0] - less[1] + 0.2) * a[:, 1::2]) @ values
    normed = mix * torch.rsqrt(mix.square().mean(-1, keepdim=True) + 1e-5) * w["head_norm.weight"]
    close(c.run(x(), STEP), (0.8 * normed).transpose(1, 2).reshape(12, -1) @ w["out.weight"].T)


def test_what_both_softmaxes_say_cancels() -> None:
    """With equal queries and keys in a pair and a weight of 1 nothing is left."""
    c = part("mixers", "diff_attention", heads=4)
    same = {
        f"{n}__weight": w for n in "qk" for w in [c.weights()[f"{n}.weight"].view(2, 2, 8, D)[:, [0, 0]].reshape(D, D)]
    }
    put(c, **same, lambda_q=torch.tensor([[math.log(1.8) / 8], [0.0]], dtype=torch.float64).expand(2, 8))
    put(c, lambda_k=torch.ones(2, 8))
    assert float(c.run(x(), STEP).detach().abs().max()) < 1e-9


@pytest.mark.parametrize("layer", [0, 1, 5, 40])
def test_the_second_softmax_weighs_more_in_later_layers(layer: int) -> None:
    """0.8 - 0.6 exp(-0.3 layer): 0.2 in the first, 0.36 in the second, near 0.8 in late ones."""
    plan = DiffAttention(heads=4)
    site = Site("part", layer, 41, D, D)
    assert plan.start(site) == pytest.approx({0: 0.2, 1: 0.3555091, 5: 0.6661219, 40: 0.7999963}[layer], abs=1e-6)
    built = Case(plan, site, plan.build(site))
    randomise(built.modules)
    tokens = noise((6, D), 4)
    close(built.run(tokens, built.step(1, 6)), reference(plan, built.weights(), tokens, torch.arange(6), layer), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "position", [{"kind": "rope"}, {"kind": "rope", "turns": "read"}, {"kind": "alibi", "heads": 4}]
)
def test_positions_and_memory(kind: str, position: dict[str, Any]) -> None:
    """In a model: one pass, chunks and single tokens agree, and the position matters."""
    lm = made({"mixer": {"kind": kind, "heads": 4, "kv_heads": 2, "position": "p"}}, positions={"p": position}).eval()
    whole, cache = (
        logits(lm, rows_step(ids(9)[None], horizon=32)),
        Cache(state_table(lm.spec), Size(1, 9, 4), torch.float64),
    )
    slots, said, past = [cache.open()], [], 0
    for n in (4, 1, 3, 1):
        step = rows_step(ids(9)[None, past : past + n], past, horizon=32)
        out = lm(step, cache.begin(slots, step)).logits
        assert out is not None
        said.append(out)
        past += n
    close(torch.cat(said), whole, 1e-10)
    free = made({"mixer": {"kind": kind, "heads": 4, "kv_heads": 2}}).eval()
    free.load_state_dict(lm.state_dict())
    assert not torch.allclose(logits(free, rows_step(ids(9)[None])), whole)


def test_identity_maps_with_a_bias_by_distance_are_plain_attention() -> None:
    """The bias acts after the first map, on the softmax's own heads."""
    block = {"heads": 4, "position": "p"}
    lm, plain = (
        made({"mixer": {"kind": k, **block}}, positions={"p": {"kind": "alibi", "heads": 4}})
        for k in ("talking_heads", "gqa")
    )
    lm.load_state_dict(plain.state_dict(), strict=False)
    for one in lm.blocks:
        for name in ("on_logits", "on_probs"):
            one.mixer.get_parameter(name).data.copy_(torch.eye(4))
    step = rows_step(ids(9)[None])
    close(logits(lm, step), logits(plain, step), 1e-12)


def test_what_they_add_to_the_bill() -> None:
    """Two maps of heads^2; two pairs of vectors and a norm. No state. Four times heads more in each of the products of
    a pair, and half as much again."""
    bills = {
        k: bill(spec({"mixer": {"kind": k, "heads": 4, "kv_heads": 2, "position": "p"}}), Question(8))
        for k in ("gqa", *KINDS)
    }
    gqa = bills["gqa"]
    assert {b.state_bytes for b in bills.values()} == {gqa.state_bytes}
    more = {k: b.params["total"] - gqa.params["total"] for k, b in bills.items()}
    assert more == {"gqa": 0, "talking_heads": 2 * 2 * 16, "diff_attention": 2 * (4 * 4 + 8)}
    flops = {k: b.flops["prefill"] - gqa.flops["prefill"] for k, b in bills.items()}
    assert flops == {"gqa": 0, "talking_heads": 2 * 36 * 4 * 16, "diff_attention": 2 * 36 * 2 * 16}


@pytest.mark.parametrize("fields", [{"heads": 3}, {"heads": 6, "kv_heads": 3}])
def test_heads_without_a_partner_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"`(kv_)?heads` is 3; heads stand in pairs here: an even number is accepted"):
        part("mixers", "diff_attention", **fields, head_dim=4)
