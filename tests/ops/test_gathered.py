"""Attention that multiplies what is seen: equal to the definition, and no more of the square than is declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from assay.conform.cases import tiny
from assay.conform.suite import LAWS, obeys
from assay.ops.attend import Blocks, attend, attend_lse, blocks, executed_pairs, looked_into, parts, plan
from assay.ops.attend.parts import Where, gathered_pairs, groups, multiplied
from assay.ops.attend.parts import parts as made_of
from assay.ops.sees import Sees
from assay.parts.mixers.gqa import Gqa
from assay.parts.mixers.nsa import Nsa
from assay.spec.base import PartSpec
from tests.ops.cases import Line, Problem, Slopes, problem

PATTERNS = (
    Sees(window=3, stride=4),
    Sees(chunk=5, last=2),
    Sees(causal=False, band=(2, 1), first=2),
    Sees(window=3, first=2),
    Sees(window=4),
    Sees(chunk=4),
    Sees(causal=False, band=(2, 3)),
    Sees(),
)
PLACES: dict[str, dict[str, Any]] = {
    "rows": {},
    "packed": {"packed": True},
    "one row for all": {"flat": True},
    "empty entries": {"blank": 2},
    "after others": {"past": 9},
    "decode": {"past": 12, "tokens": 1},
    "soft cap and sink": {"softcap": 1.5, "with_sink": True},
    "odd heads": {"heads": 3, "groups": 1, "width": 5},
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("sees", PATTERNS, ids=str)
def test_it_is_the_oracle_forward_and_backward(sees: Sees, place: dict[str, Any]) -> None:
    if "past" in place and not sees.causal:
        return
    fields: dict[str, Any] = {"tokens": 13, "sees": sees} | place
    p = problem(**fields)
    upstream = torch.randn(p.q.shape[0], p.q.shape[1], p.v.shape[-1], dtype=torch.float64)
    close(p.run("gathered"), p.run("oracle"))
    for a, b in zip(p.gradients("gathered", upstream), p.gradients("oracle", upstream), strict=True):
        close(a, b)


@pytest.mark.parametrize("sees", PATTERNS, ids=str)
def test_many_groups_in_packed_rows(sees: Sees, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two, so that what a query sees far from it is in no span of its group."""
    monkeypatch.setattr(parts, "GROUP", 2)
    for place in ({"packed": True}, {"flat": True}, {"blank": 2}, {"rows": 1, "packed": True}):
        fields: dict[str, Any] = {"tokens": 21, "sees": sees} | place
        p = problem(**fields)
        close(p.run("gathered"), p.run("oracle"))


@pytest.mark.parametrize("bias", [Slopes, Line])
def test_a_bias_in_inference_and_the_log_sum_exp(bias: type[Slopes]) -> None:
    p = problem(tokens=13, sees=Sees(window=3, stride=4), with_bias=bias, with_sink=True)
    with torch.no_grad():
        for a, b in zip(lse(p, "gathered"), lse(p, "oracle"), strict=True):
            close(a, b)
    p.leaves()
    with pytest.raises(ValueError, match="`gathered` has no gradient for a bias with parameters of its own"):
        p.run("gathered")


def lse(p: Problem, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return attend_lse(p.q, p.view, p.step, p.sees, p.scores, p.plan(backend))


def test_what_it_cannot_do_is_refused_or_left_to_others() -> None:
    rule = Sees(window=3, stride=4)
    with pytest.raises(ValueError, match="`gathered` makes its probabilities again"):
        problem(sees=rule, dropout=0.5).run("gathered")
    with pytest.raises(ValueError, match="has no parts for a rule with a `prefix`"):
        problem(sees=Sees(prefix=True)).run("gathered")
    p = problem(rows=1, tokens=1200, heads=1, groups=1, sees=Sees(window=32, stride=32), dropout=0.5)
    assert p.plan("auto").parts is not None and p.run("auto").shape == p.q.shape
    torch.use_deterministic_algorithms(True)
    try:
        assert p.plan("auto").parts is None
    finally:
        torch.use_deterministic_algorithms(False)


@st.composite
def rules(draw: st.DrawFn) -> Sees:
    near = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(("stride", "last", "first", "band", "window", "chunk")))
    match kind:
        case "stride":
            return Sees(window=near, stride=draw(st.integers(2, 40)))
        case "last":
            return Sees(chunk=near + 1, last=draw(st.integers(1, near)))
        case "first":
            return Sees(window=near, first=draw(st.integers(1, 20)))
        case "band":
            return Sees(causal=False, band=(near, draw(st.integers(0, 9))), first=draw(st.integers(0, 5)))
        case "window":
            return Sees(window=near)
    return Sees(chunk=near)


@given(rules(), st.integers(1, 300), st.integers(0, 200))
def test_every_visible_pair_is_in_one_part_once(rule: Sees, new: int, past: int) -> None:
    where = Where.alone(new, past if rule.causal else 0)
    found = groups(rule, where)
    assert found is not None
    made = made_of(rule, where, found)
    table = np.zeros((new + 1, where.k_index.shape[1]), np.int64)
    for part in made:
        mask = torch.ones(1, *part.q.shape, part.k.shape[1]) if part.mask is None else part.mask
        q, k = torch.broadcast_tensors(part.q[:, :, None], part.k[:, None])
        np.add.at(table, (q.numpy(), k.numpy()), mask[0].numpy().astype(np.int64))
    assert (table[:new] == rule.visible(where.q_index[0][:, None], where.k_index[0])).all() and not table[new].any()
    assert sum(part.pairs for part in made) == multiplied(found, 1)


LARGE = (
    (Sees(window=38, stride=38), 1500, 0),
    (Sees(window=33, stride=33), 512, 1700),
    (Sees(chunk=38, last=2), 1500, 0),
    (Sees(chunk=50, last=2), 300, 5000),
    (Sees(window=30, first=4), 1500, 0),
    (Sees(causal=False, band=(15, 15), first=4), 1500, 0),
)


@pytest.mark.parametrize(("sees", "new", "past"), LARGE, ids=str)
def test_large_squares_are_gathered_and_counted(sees: Sees, new: int, past: int) -> None:
    p = problem(rows=1, tokens=new, past=past, heads=2, groups=1, sees=sees)
    assert p.plan("auto").parts is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = p.run("auto")
    assert counter.get_total_flops() == 4 * 2 * 3 * executed_pairs(new, past, sees)
    assert executed_pairs(new, past, sees) * 6 <= new * (new + past)
    close(out, p.run("matmul"))


def test_small_squares_and_rules_that_hide_little_are_not() -> None:
    for sees, new in (
        (Sees(window=8, stride=8), 64),
        (Sees(window=300, stride=9), 700),
        (Sees(window=8), 700),
        (Sees(), 700),
    ):
        assert gathered_pairs(new, 0, sees) is None and executed_pairs(new, 0, sees) == executed_pairs(
            new, 0, sees, "matmul"
        )
        assert problem(rows=1, tokens=new, sees=sees).plan("auto").parts is None
    assert gathered_pairs(1, 1 << 21, Sees(window=64, stride=64)) is None  # decoding


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_what_is_multiplied_grows_as_the_root(kind: str) -> None:
    """Child et al. 2019, section 4.2: N sqrt N pairs, of which at most twice as many are multiplied, and fewer still
    where groups of queries are small beside the root."""
    roots = (32, 64, 128)
    rules = [Sees(window=r, stride=r) if kind == "strided" else Sees(chunk=r, last=1) for r in roots]
    counts = [executed_pairs(r * r, 0, rule, "gathered") for r, rule in zip(roots, rules, strict=True)]
    more = [count / rule.pairs(r * r, 0) for count, r, rule in zip(counts, roots, rules, strict=True)]
    assert more == sorted(more, reverse=True) and 1 <= more[-1] < 2
    assert np.polyfit(np.log([r * r for r in roots]), np.log(counts), 1)[0] < 1.55


@pytest.mark.parametrize("by", ["mean", "bounds"])
@pytest.mark.parametrize("size, keep", [(3, 2), (2, 3), (4, 1)])
def test_chosen_blocks_alone_are_the_square_with_a_mask(
    by: str, size: int, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 1)
    rule = Blocks.model_validate({"by": by, "size": size, "keep": keep})
    for place in (*PLACES.values(), {"heads": 2, "groups": 2}):
        fields: dict[str, Any] = {"tokens": 17} | place
        p = problem(**fields)
        leaves = p.leaves()
        outs = []
        for made in (None, plan(p.step, p.layout, p.sees, "matmul")):
            cut = looked_into(rule, made, p.q, p.view, p.step, p.sees)
            assert cut is not None and (cut.parts is None) == (made is not None)
            outs.append(attend(p.q, p.view, p.step, p.sees, p.scores, cut))
        close(*outs)
        upstream = torch.randn_like(outs[0])
        for a, b in zip(*(torch.autograd.grad((o * upstream).sum(), leaves) for o in outs), strict=True):
            close(a, b)


@pytest.mark.parametrize(("new", "past"), [(1100, 0), (1030, 37), (600, 1300)])
def test_chosen_blocks_multiply_what_is_declared(new: int, past: int) -> None:
    rule = Blocks(size=16, keep=4)
    p = problem(rows=1, tokens=new, past=past, heads=2, groups=1)
    cut = looked_into(rule, None, p.q, p.view, p.step, p.sees)
    with FlopCounterMode(display=False) as counter:
        attend(p.q, p.view, p.step, p.sees, p.scores, cut)
    assert counter.get_total_flops() == 4 * 2 * 3 * rule.multiplied(new, past)
    assert rule.pairs(new, past) <= rule.multiplied(new, past) < new * (new + past) / 4


def sparse() -> list[PartSpec]:
    limited = [s for s in tiny(Gqa) if isinstance(s, Gqa) and (s.sees != Sees() or s.scores.blocks is not None)]
    return [*(s for s in limited if not s.sees.prefix), *tiny(Nsa)]


@pytest.mark.parametrize("law", [n for n in LAWS if n not in ("traces", "roundtrip", "fields", "weights", "device")])
def test_laws_hold_where_everything_is_gathered(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores, packing, chunks of prompts and decoding, with squares of any size cut into parts."""
    for name, value in (("SMALLEST", 1), ("SHARE", 0), ("SPAN", 1)):
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(blocks, "SMALLEST", 1)
    for memory in (gathered_pairs, executed_pairs):
        memory.cache_clear()
    try:
        for spec in sparse():
            obeys(spec, law)
    finally:
        for memory in (gathered_pairs, executed_pairs):
            memory.cache_clear()
