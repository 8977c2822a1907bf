"""Sparse attention against the dense attention that it leaves pairs out of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from assay.conform.cases import Case
from assay.conform.stored import open_cache
from assay.parts.mixers.gqa import Gqa
from assay.parts.mixers.nsa import Nsa
from assay.spec import registry
from assay.spec.base import Site
from assay.spec.load import validate
from assay.spec.model import ModelSpec
from tests.parts.small import close, part, put, rows, stored, x

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 6}
NSA: dict[str, Any] = {
    **HEADS,
    "compress": {"size": 2, "stride": 1, "hidden": 5},
    "size": 2,
    "keep": 3,
    "initial": 0,
    "local": 1,
    "window": 3,
}
BLOCKS = ({"size": 3, "keep": 2}, {"by": "bounds", "size": 2, "keep": 3})


def bound(kind: str, scheme: dict[str, Any], **fields: Any) -> Case:
    c = part("mixers", kind, **fields, position="p")
    made = registry.get("positions", "rope").model_validate({"kind": "rope", "theta": 100.0, **scheme})
    c.part.bind({"p": made.build(Site("positions.p"))})
    return c


def heard(c: Case, tokens: Tensor, name: str) -> Tensor:
    taps: dict[str, Tensor] = {}
    c.run(tokens, rows(1, len(tokens), listen=frozenset([f"*.{name}"])), taps=taps)
    return taps[f"part.{name}"]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_blocks_that_hold_everything_are_full_attention(blocks: dict[str, Any]) -> None:
    """Up to the budget; the tokens behind it see less."""
    sparse, full = part("mixers", "gqa", **HEADS, scores={"blocks": blocks}), part("mixers", "gqa", **HEADS)
    tokens, budget = x(13), 6
    mine, theirs = sparse.run(tokens, rows(1, 13)), full.run(tokens, rows(1, 13))
    close(mine[:budget], theirs[:budget])
    assert all(not torch.allclose(a, b) for a, b in zip(mine[budget:], theirs[budget:], strict=True))
    wide = part("mixers", "gqa", **HEADS, scores={"blocks": {**blocks, "keep": 7}})
    close(wide.run(tokens, rows(1, 13)), theirs)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_pairs_are_those_that_are_scored(blocks: dict[str, Any]) -> None:
    """The bill against the finite logits, and against their closed form."""
    c, length = part("mixers", "gqa", **HEADS, scores={"blocks": blocks}), 13
    finite = heard(c, x(length), "scores").isfinite()
    size, keep = blocks["size"], blocks["keep"]
    for i, seen in enumerate(finite.sum(-1).tolist()):
        assert seen == [min(keep - 1, i // size) * size + i % size + 1] * 4
    weighed = sum(i // size for i in range(length)) * (2 if blocks.get("by") == "bounds" else 1)
    assert isinstance(c.spec, Gqa)
    assert c.spec.cost(c.site, length, 0).flops == 4 * 6 * int(finite.sum()) + 2 * 4 * 6 * weighed
    halves = c.spec.cost(c.site, 8, 0).flops + c.spec.cost(c.site, 5, 8).flops
    assert halves == c.spec.cost(c.site, length, 0).flops


@pytest.mark.parametrize(
    ("kind", "scheme", "fields"),
    [
        ("gqa", {}, {**HEADS, "scores": {"blocks": BLOCKS[0]}}),
        ("gqa", {"turns": "read"}, {**HEADS, "scores": {"blocks": BLOCKS[1]}}),
        ("nsa", {}, NSA),
    ],
)
def test_turned_keys_choose_alike_in_chunks_and_at_once(kind: str, scheme: dict[str, Any], fields: Any) -> None:
    c, tokens = bound(kind, scheme, **fields), x(13)
    whole = c.run(tokens, rows(1, 13))
    close(stored(c, tokens, (6, 1, 1, 4, 1)), whole, 1e-10)
    assert not torch.allclose(part("mixers", kind, **fields).run(tokens, rows(1, 13)), whole)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [*(("gqa", {**HEADS, "scores": {"blocks": b}}) for b in BLOCKS), ("nsa", NSA)],
)
def test_sequences_that_bring_unequal_numbers_of_tokens(kind: str, fields: dict[str, Any]) -> None:
    """A chunk of 7 beside one of 2, after 4 and 9 tokens, in a view that is one row for both."""
    c = part("mixers", kind, **fields)
    c.modules.eval()
    docs, lengths = (x(11, 1), x(11, 2)), ((4, 7), (9, 2))
    cache, slots = open_cache(c, 2, 9)
    told: list[list[Tensor]] = [[], []]
    for number in (0, 1):
        starts = [sum(n[:number]) for n in lengths]
        index = torch.cat([torch.arange(at, at + n[number]) for at, n in zip(starts, lengths, strict=True)])
        counts = torch.tensor([n[number] for n in lengths])
        step = rows(1, len(index)).with_(
            seq=torch.arange(2).repeat_interleave(counts),
            index=index,
            positions=index,
            starts=F.pad(counts.cumsum(0), (1, 0)),
            past=torch.tensor(starts),
            horizon=torch.tensor([64, 64]),
            grid=None,
            longest=int(counts.max()),
            saves=counts.cumsum(0) - 1,
        )
        new = torch.cat([d[at : at + n[number]] for d, at, n in zip(docs, starts, lengths, strict=True)])
        y = c.run(new, step, cache.begin(slots, step))
        for pieces, piece in zip(told, y.split(counts.tolist()), strict=True):
            pieces.append(piece)
    for pieces, doc in zip(told, docs, strict=True):
        close(torch.cat(pieces), c.run(doc, rows(1, 11)), 1e-10)


def alone(number: int, **fields: Any) -> Case:
    """NSA whose gates are exactly 1 for one branch and 0 for the others, when the first input is 1."""
    c = part("mixers", "nsa", **{**NSA, **fields})
    gates = torch.zeros(12, 32, dtype=torch.float64)
    gates[:, 0] = torch.tensor([1000.0 if i % 3 == number else -1000.0 for i in range(12)])
    put(c, gate__weight=gates)
    return c


def gqa(c: Case, name: str, **fields: Any) -> Case:
    """Grouped-query attention with the weights of one branch."""
    made = part("mixers", "gqa", **HEADS, **fields)
    w = c.weights()
    put(made, q__weight=w["q.weight"], out__weight=w["out.weight"])
    put(made, k__weight=w[f"k_{name}.weight"], v__weight=w[f"v_{name}.weight"])
    return made


def ones(n: int) -> Tensor:
    tokens = x(n)
    tokens[:, 0] = 1.0
    return tokens


def test_the_window_alone_is_attention_in_a_window() -> None:
    c = alone(2)
    close(c.run(ones(11), rows(1, 11)), gqa(c, "window", sees={"window": 3}).run(ones(11), rows(1, 11)))


def test_all_blocks_selected_are_full_attention() -> None:
    """Up to the budget of 3 blocks of 2, and with a budget for everything."""
    few, all_ = alone(1), alone(1, keep=6)
    full = gqa(few, "select").run(ones(11), rows(1, 11))
    close(few.run(ones(11), rows(1, 11))[:6], full[:6])
    assert not torch.allclose(few.run(ones(11), rows(1, 11)), full)
    close(all_.run(ones(11), rows(1, 11)), full)


def test_compressed_blocks_of_one_token_are_full_attention() -> None:
    """With a map that is nearly the identity: silu(z + 40) - 40 is z."""
    c = alone(0, compress={"size": 1, "stride": 1, "hidden": 7})
    into, out = torch.zeros(7, 6, dtype=torch.float64), torch.zeros(6, 7, dtype=torch.float64)
    into[:6], out[:, :6] = torch.eye(6), torch.eye(6)
    into[6, 0] = 0.0
    place = torch.full((1, 6), 40.0, dtype=torch.float64)
    for kv in "kv":
        put(c, **{f"{kv}_in__weight": into, f"{kv}_out__weight": out, f"{kv}_place": place})
    tokens = 0.1 * ones(9)
    tokens[:, 0] = 1.0
    w = c.weights()
    q, k, v = ((tokens @ w[f"{n}.weight"].T).view(9, -1, 6).transpose(0, 1) for n in ("q", "k_compress", "v_compress"))
    # Keys that are all longer by the same 40 change no softmax; values are longer by 40.
    k, v = (t.repeat_interleave(2, 0) for t in (k, v))
    mix = F.scaled_dot_product_attention(q[None], k[None], v[None] + 40, is_causal=True)[0].transpose(0, 1).flatten(1)
    close(c.run(tokens, rows(1, 9)), mix @ w["out.weight"].T, 1e-10)


def test_a_group_of_heads_selects_together() -> None:
    """Its heads may change places and the choice stays; a head that changes its group changes the choice."""
    c, tokens = part("mixers", "nsa", **NSA), x(16)
    before = heard(c, tokens, "choice")
    assert before.shape[:3] == (1, 2, 16) and not torch.equal(before[:, 0], before[:, 1])
    q = c.weights()["q.weight"].clone()
    for order, same in (([1, 0, 3, 2], True), ([0, 2, 1, 3], False)):
        put(c, q__weight=q.view(4, 6, 32)[order].reshape(24, 32))
        assert torch.equal(heard(c, tokens, "choice"), before) == same


@pytest.mark.parametrize(("initial", "local"), [(1, 1), (0, 2), (1, 2), (2, 1)])
def test_first_and_last_blocks_are_always_selected(initial: int, local: int) -> None:
    """Beside the query's own, which is one of the last; never more than `keep`, and as many where there are."""
    picked = heard(part("mixers", "nsa", **{**NSA, "initial": initial, "local": local}), x(16), "choice")[0]
    for t in range(16):
        own = t // 2
        forced = [b for b in range(own) if b < initial or b > own - local]
        assert picked[:, t, forced].all() and not picked[:, t, own:].any()
        assert picked[:, t].sum(-1).tolist() == [min(2, own)] * 2


def test_a_selection_has_no_gradient() -> None:
    """What scores the blocks learns by the compressed branch alone: with its gate at 0 it does not."""
    c = alone(1)
    c.run(ones(12), rows(1, 12)).square().sum().backward()
    grads = {n: p.grad for n, p in c.part.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert {"q.weight", "k_select.weight", "v_select.weight", "out.weight"} == grads.keys()


@pytest.mark.parametrize(("new", "seen"), [(16, 0), (7, 9), (1, 15), (3, 0)])
def test_the_bill_of_nsa(new: int, seen: int) -> None:
    """Pairs of the three branches by counting, and the maps of the blocks that come to an end."""
    spec = Nsa.model_validate({"kind": "nsa", **NSA, "compress": {"size": 4, "stride": 2, "hidden": 5}, "size": 4})
    pairs = ended = 0
    for i in range(seen, seen + new):
        behind = [s for s in range(0, i + 1, 2) if s + 4 <= i + 1]
        picked = min(2, i // 4)
        pairs += len(behind) + 4 * picked + i % 4 + 1 + min(i + 1, 3)
        ended += sum(s + 4 == i + 1 for s in behind)
    site = Site()
    maps = sum(w.flops for n, w in spec.weights(site).items() if "_in." in n or "_out." in n)
    assert maps == 2 * 2 * (24 * 5 + 5 * 6)
    assert spec.cost(site, new, seen).flops + maps * new == 4 * 4 * 6 * pairs + 2 * maps * ended


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        ({"kind": "gqa", "heads": 4, "sees": {"window": 4}, "scores": {"blocks": {}}}, "`scores.blocks` chooses among"),
        ({"kind": "gqa", "heads": 4, "scores": {"blocks": {"keep": 0}}}, "keep"),
        ({"kind": "talking_heads", "heads": 4, "scores": {"blocks": {}}}, "talking_heads looks at all"),
        ({"kind": "diff_attention", "heads": 4, "scores": {"blocks": {}}}, "diff_attention looks at all"),
        ({"kind": "nsa", "heads": 4, "kv_heads": 3}, "`heads` .4. is not a multiple of `kv_heads` .3."),
        ({"kind": "nsa", "heads": 5}, "give `head_dim`"),
        ({"kind": "nsa", "heads": 4, "compress": {"size": 32, "stride": 12}}, "size 32, stride 12; accepted"),
        ({"kind": "nsa", "heads": 4, "size": 16}, "a size of at most 16"),
        ({"kind": "nsa", "heads": 4, "keep": 2}, "`initial` . `local` .3. is more than `keep` .2."),
        ({"kind": "nsa", "heads": 4, "position": "p"}, "nsa needs a scheme with `turns: write`"),
    ],
)
def test_what_does_not_go_together_is_refused(mixer: dict[str, Any], message: str) -> None:
    scheme = {"kind": "rope", "turns": "read"}
    tree = {"d_model": 32, "vocab": 11, "layers": 1, "context": 16, "positions": {"p": scheme}}
    with pytest.raises(ValueError, match=message):
        validate(ModelSpec, {**tree, "blocks": {"b": {"mixer": mixer}}}, "here")


def test_a_scheme_that_adds_a_bias_is_refused() -> None:
    c = part("mixers", "nsa", **NSA, position="p")
    alibi = registry.get("positions", "alibi").model_validate({"kind": "alibi", "heads": 4}).build(Site("positions.p"))
    with pytest.raises(ValueError, match="adds a bias"):
        c.part.bind({"p": alibi})
