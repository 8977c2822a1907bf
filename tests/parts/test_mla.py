"""Latent attention against torch's own, against the attention it generalises, and in its two forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.cache import Cache, Size
from assay.conform.cases import Case
from assay.conform.stored import feed
from assay.parts.positions import rope
from assay.spec import registry
from assay.spec.base import Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.parts.small import close, part, put, rows, stored, x

SIZES: dict[str, Any] = {"heads": 4, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
YARN = {"kind": "yarn", "factor": 4.0, "original": 8, "beta_fast": 2.0, "beta_slow": 0.25}
INDEX: dict[str, Any] = {"kind": "indexer", "heads": 3, "head_dim": 5}
SCHEMES: list[dict[str, Any]] = [
    {"theta": 100.0},
    {"scaling": YARN},
    {"scaling": {"kind": "dynamic", "factor": 2.0, "original": 8}},
]


def mla(scheme: dict[str, Any] | None = None, **fields: Any) -> Case:
    c = part("mixers", "mla", **{**SIZES, "position": None if scheme is None else "p", **fields})
    if scheme is not None:
        made = registry.get("positions", "rope").model_validate({"kind": "rope", **scheme})
        c.part.bind({"p": made.build(Site("positions.p"))})
    return c


@pytest.mark.parametrize(
    ("scheme", "select"), [*((s, None) for s in SCHEMES), *((s, {**INDEX, "keep": 4}) for s in SCHEMES[:2])]
)
def test_folded_and_expanded_are_one_function(scheme: dict[str, Any], select: Any) -> None:
    """Single tokens in either form, after a chunk, and all at once."""
    c, tokens = mla(scheme, q_rank=14, select=select), x(9)
    folded = stored(c, tokens, (5, 1, 1, 1, 1))
    close(folded, c.run(tokens, rows(1, 9)), 1e-10)
    c.part.folds = False
    close(folded, stored(c, tokens, (5, 1, 1, 1, 1)), 1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_is_torchs_attention_on_keys_made_for_every_head(scheme: dict[str, Any]) -> None:
    """k_h = [W_h c, R k], q_h = [q, R q], v_h = V_h c with R turned a pair at a time, and one k for all heads."""
    c, tokens = mla(scheme, scale=0.3), x(7)
    w = c.weights()
    q = (tokens @ w["q.weight"].T).view(7, 4, 10)
    down = tokens @ w["kv_down.weight"].T
    latent = F.rms_norm(down[:, :10], (10,), w["kv_norm.weight"], 1e-6)
    up = (latent @ w["kv_up.weight"].T).view(7, 4, 11)
    spec = rope.Rope.model_validate(scheme)
    q_rope, k_rope = rope.reference(spec, {}, q[..., 6:], down[:, None, 10:], torch.arange(7), 64)
    q, k = torch.cat([q[..., :6], q_rope], -1), torch.cat([up[..., :6], k_rope.expand(-1, 4, -1)], -1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, up[..., 6:]))
    mix = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)[0].transpose(0, 1).flatten(1)
    close(c.run(tokens, rows(1, 7)), mix @ w["out.weight"].T, 1e-10)


def test_grouped_queries_are_latents_of_twice_the_key_width() -> None:
    """Keys and values of G heads of K are a latent of 2 G K numbers, read by maps that copy them (2502.07864)."""
    gqa = part("mixers", "gqa", heads=4, kv_heads=2, head_dim=6)
    w = gqa.weights()
    sizes: dict[str, Any] = {
        "kv_rank": 2 * 2 * 6,
        "nope_dim": 6,
        "rope_dim": 2,
        "value_dim": 6,
        "norm": None,
        "scale": 6**-0.5,
    }
    c = mla(**sizes)
    copies = torch.zeros(4, 12, 24, dtype=torch.float64)
    for head in range(4):
        for i in range(6):
            copies[head, i, head // 2 * 6 + i] = copies[head, 6 + i, 12 + head // 2 * 6 + i] = 1.0
    blank = torch.zeros(2, 32, dtype=torch.float64)
    queries = torch.cat([w["q.weight"].view(4, 6, 32), torch.zeros(4, 2, 32, dtype=torch.float64)], 1)
    put(c, q__weight=queries.flatten(0, 1), kv_down__weight=torch.cat([w["k.weight"], w["v.weight"], blank]))
    put(c, kv_up__weight=copies.flatten(0, 1), out__weight=w["out.weight"])
    close(c.run(x(), rows(2, 6)), gqa.run(x(), rows(2, 6)), 1e-12)


@pytest.mark.parametrize("select", [None, {**INDEX, "keep": 4}])
@pytest.mark.parametrize("new", [1, 3])
def test_flops_after_a_past(new: int, select: Any) -> None:
    """What torch counts of `new` tokens after eight is what the spec says: absorbed for one, expanded for three."""
    c = mla(q_rank=14, select=select)
    c.modules.eval()
    cache = Cache(c.fields, Size(1, 8 + new, 8), torch.float64)
    slots = [cache.open()]
    feed(c, cache, slots, x(8)[None], 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        feed(c, cache, slots, x(new, 2)[None], 8)
    told = c.spec.cost(c.site, new, 8)
    for child, place in c.spec.children(c.site).values():
        told += child.cost(place, new, 8)
    assert counter.get_total_flops() == sum(w.flops for w in c.spec.weights(c.site).values()) * new + told.executed


def test_flops_of_a_pair() -> None:
    """DeepSeek-V3's 128 heads: 2 * 128 * (128 + 64 + 128) expanded, 2 * 128 * (512 + 64 + 512) absorbed."""
    spec = registry.get("mixers", "mla").model_validate({"kind": "mla", "heads": 128, "kv_rank": 512, "q_rank": 1536})
    site = Site(d_in=7168, d_out=7168)
    assert spec.cost(site, 1000, 0).flops == 2 * 128 * 320 * 1000 * 1001 // 2
    assert spec.cost(site, 1, 999).flops == 2 * 128 * 1088 * 1000
    assert spec.cost(site, 2, 998).flops == 2 * 128 * (320 * 1999 + 512 * 256 * 998)


def test_what_is_remembered() -> None:
    """The latent and one key of `rope_dim`, whatever the heads; the indexer adds its own key."""
    plain, chosen = mla(heads=2), mla(heads=4, select={**INDEX, "keep": 4})
    assert [(f.per, f.shape) for f in plain.spec.state(plain.site)] == [("token", (14,))]
    assert [(f.per, f.shape) for f in chosen.spec.state(chosen.site)] == [("token", (14,)), ("token", (5,))]


def pair(keep: int, **more: Any) -> tuple[Case, Case]:
    """With and without a selector, the same weights."""
    chosen, plain = mla({}, q_rank=14, select={**INDEX, "keep": keep}, **more), mla({}, q_rank=14, **more)
    put(plain, **{n.replace(".", "__"): w for n, w in chosen.weights().items() if not n.startswith("select.")})
    return chosen, plain


def test_keeping_as_many_as_there_are_is_no_selection() -> None:
    chosen, plain = pair(7)
    assert torch.equal(chosen.run(x(7), rows(1, 7)), plain.run(x(7), rows(1, 7)))
    fewer, plain = pair(4)
    mine, full = fewer.run(x(7), rows(1, 7)), plain.run(x(7), rows(1, 7))
    close(mine[:4], full[:4])
    assert all(not torch.allclose(a, b) for a, b in zip(mine[4:], full[4:], strict=True))


def test_equal_sums_choose_the_earliest() -> None:
    """Without weights every sum is zero: all tokens look at the first `keep`."""
    chosen, plain = pair(3)
    put(chosen, select__weigh__weight=torch.zeros(3, 32))
    whole, told = x(8), chosen.run(x(8), rows(1, 8))
    for i in range(3, 8):
        seen = torch.cat([whole[:3], whole[i : i + 1]])
        step = rows(1, 4)
        place = torch.tensor([0, 1, 2, i])
        # The last of these four tokens looks at the three before it and at itself, which its own choice left out.
        taps: dict[str, Tensor] = {}
        plain.run(seen, step.with_(positions=place, listen=frozenset(["*.scores"])), taps=taps)
        share = taps["part.scores"][3, :, :3].softmax(-1)
        w = plain.weights()
        latent = F.rms_norm(whole[:3] @ w["kv_down.weight"][:10].T, (10,), w["kv_norm.weight"], 1e-6)
        values = (latent @ w["kv_up.weight"].T).view(3, 4, 11)[..., 6:]
        close(told[i], torch.einsum("hs,shv->hv", share, values).flatten() @ w["out.weight"].T, 1e-10)


def test_a_choice_has_no_gradient() -> None:
    chosen, _ = pair(3)
    chosen.run(x(8), rows(1, 8)).square().sum().backward()
    grads = {n: p.grad for n, p in chosen.part.named_parameters()}
    assert all((g is None) == n.startswith("select.") for n, g in grads.items())


@pytest.mark.parametrize("keep", [3, 16])
def test_what_an_indexer_learns_from(keep: int) -> None:
    """The divergence of torch, token by token, over what is attended to; padding is counted nowhere."""
    c = mla({}, q_rank=14, select={**INDEX, "keep": keep, "align": 0.5})
    tokens, taps = x(16), dict[str, Tensor]()
    step = rows(2, 8, listen=frozenset(["*.scores"]))
    padding = torch.arange(16) >= 13
    c.run(tokens, step.with_(seq=step.seq.masked_fill(padding, -1)), taps=taps)
    w, scheme, losses = {n.removeprefix("select."): t for n, t in c.weights().items()}, c.part.scheme[0], []
    scheme_step = step.with_(tables={scheme.name: scheme.prepare(step, None)})
    k = F.layer_norm(tokens @ w["k.weight"].T, (5,), w["k_norm.weight"], w["k_norm.bias"], 1e-6)
    latent = F.rms_norm(tokens @ w["q_down.weight"].T, (14,), w["q_norm.weight"], 1e-6)
    q = (latent @ w["q.weight"].T).view(16, 3, 5)
    turned = scheme.on_qk(q[..., :4], k[:, None, :4], scheme_step)
    q, k = torch.cat([turned[0], q[..., 4:]], -1), torch.cat([turned[1][:, 0], k[:, 4:]], -1)
    for t in range(13):
        z, first = taps["part.scores"][t], t // 8 * 8
        seen = z[0].isfinite().nonzero()[:, 0]
        assert len(seen) == min(keep, t - first + 1)
        sums = ((tokens[t] @ w["weigh.weight"].T)[:, None] * F.relu(q[t] @ k[first : first + 8].T)).sum(0) / 15**0.5
        p = z[:, seen].softmax(-1).mean(0)
        losses.append(F.kl_div(sums[seen].log_softmax(-1), p, reduction="sum"))
    close(taps["part.select.loss.align"], 0.5 * torch.stack(losses).mean())


def test_an_indexer_learns_alone() -> None:
    """Its loss reaches no other weight and not the input; what the model learns from reaches none of its own."""
    tokens, taps = x(8).requires_grad_(), dict[str, Tensor]()
    c = mla({}, q_rank=14, select={**INDEX, "keep": 3, "align": 0.5})
    y = c.run(tokens, rows(1, 8), taps=taps)
    own = {n for n, _ in c.part.named_parameters() if n.startswith("select.")}
    taps["part.select.loss.align"].backward(retain_graph=True)
    assert {n for n, p in c.part.named_parameters() if p.grad is not None and p.grad.any()} == own
    assert tokens.grad is None
    c.part.zero_grad()
    y.square().sum().backward()
    assert {n for n, p in c.part.named_parameters() if p.grad is None} == own
    c.modules.eval()
    taps.clear()
    c.run(tokens, rows(1, 8), taps=taps)
    assert not taps


@pytest.mark.parametrize(("new", "seen"), [(9, 0), (1, 3), (1, 8), (5, 2), (2, 6)])
def test_pairs_that_are_left(new: int, seen: int) -> None:
    spec = registry.get("selectors", "indexer").model_validate({**INDEX, "keep": 4})
    pairs = sum(min(4, i + 1) for i in range(seen, seen + new))
    assert spec.pairs(new, seen) == pairs  # type: ignore[attr-defined]
    told = registry.get("mixers", "mla").model_validate({"kind": "mla", **SIZES, "select": spec})
    visible = sum(i + 1 for i in range(seen, seen + new))
    scored = visible if seen + new > 4 else 0
    if new > 1:
        assert told.cost(Site(), new, seen).flops == 2 * 4 * (15 * pairs + 10 * 11 * seen)
    assert spec.cost(Site(), new, seen).flops == 2 * 3 * 6 * scored


@pytest.mark.parametrize(
    ("position", "mixer", "message"),
    [
        ({"turns": "read"}, {"select": INDEX}, "`select` needs a scheme with `turns: write`"),
        ({}, {"select": {**INDEX, "head_dim": 3}}, "`select.head_dim` is 3, of which the mixer turns 4"),
        ({}, {"norm": "batchnorm"}, "`norm` 'batchnorm' mixes tokens; accepted: rmsnorm, layernorm"),
        ({}, {"select": {**INDEX, "norm": "batchnorm"}}, "`norm` 'batchnorm' mixes tokens"),
        ({}, {"rope_dim": 5}, "RoPE turns pairs: 5 dimensions are odd"),
    ],
)
def test_what_does_not_go_together_is_refused(position: Any, mixer: Any, message: str) -> None:
    block = {"mixer": {"kind": "mla", **SIZES, "position": "p", **mixer}}
    tree = {"d_model": 32, "vocab": 11, "layers": 1, "context": 16, "positions": {"p": {"kind": "rope", **position}}}
    with pytest.raises(ValueError, match=message):
        validate(ModelSpec, {**tree, "blocks": {"b": block}}, "here")
