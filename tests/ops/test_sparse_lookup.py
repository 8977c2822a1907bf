"""A decode step of a layer that chooses blocks: only these are multiplied, and it is what the loops say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from assay.ops.attend import Blocks, Scores, attend, looked_into, lookup
from assay.ops.sees import Sees
from assay.ops.step import InPages, Layout, Step, View

ROWS, ENTRIES, HEADS, GROUPS, SIZE, PAGE = 4, 48, 4, 2, 6, 8
# Where each row's sequence begins in its view, and the place of its last token; the last row is padding.
BEGINS, LASTS = (0, 5, 0, 0), (47, 30, 3, 9)
RULES = [Blocks(by=by, size=3, keep=keep) for by in ("mean", "bounds") for keep in (1, 4)]


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    q = torch.randn(ROWS, HEADS, SIZE, generator=g, dtype=torch.float64)
    k, v = (torch.randn(ROWS, ENTRIES, GROUPS, SIZE, generator=g, dtype=torch.float64) for _ in "kv")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def places() -> tuple[Step, Layout]:
    begins, lasts = torch.tensor(BEGINS)[:, None], torch.tensor(LASTS)
    index = torch.arange(ENTRIES) - begins
    there = (index >= 0) & (index <= lasts[:, None])
    row = torch.arange(ROWS)
    seq = torch.where(row < ROWS - 1, row, -1)
    index = torch.where(there, index, -1)
    layout = Layout(torch.where(there, seq[:, None], -1), index, index, True)
    ids = torch.zeros(ROWS, dtype=torch.long)
    step = Step({"ids": ids}, seq, lasts, lasts, torch.arange(ROWS + 1), lasts, lasts + 1, (ROWS, 1), ROWS, 1)
    return step, layout


def paged(k: Tensor, v: Tensor) -> InPages:
    """The same entries in pages that stand in another order."""
    order = torch.randperm(ROWS * ENTRIES // PAGE, generator=torch.Generator().manual_seed(4))
    pools = {n: torch.empty(len(order), PAGE, GROUPS, SIZE, dtype=t.dtype) for n, t in (("k", k), ("v", v))}
    for name, t in (("k", k), ("v", v)):
        pools[name][order] = t.view(-1, PAGE, GROUPS, SIZE)
    return InPages(pools, order.view(ROWS, -1))


def by_loops(rule: Blocks, scores: Scores, row: int, head: int) -> Tensor:
    """Quest's and MoBA's choice for one query, and softmax over what it sees."""
    q, k, v = drawn()
    begin, last, group = BEGINS[row], LASTS[row], head // (HEADS // GROUPS)
    keys, values = (t[row, begin : begin + last + 1, group] for t in (k, v))
    query, own, worth = q[row, head], last // rule.size, {}
    for b in range(own):
        inside = keys[b * rule.size : (b + 1) * rule.size]
        bounds = torch.maximum(query * inside.amin(0), query * inside.amax(0)).sum()
        worth[b] = float(bounds if rule.by == "bounds" else query @ inside.mean(0))
    chosen = {own, *sorted(worth, key=lambda b: -worth[b])[: rule.keep - 1]}
    seen = [i for i in range(last + 1) if i // rule.size in chosen]
    z = scores.capped(keys[seen] @ query).exp()
    sink = 0.0 if scores.sink is None else math.exp(float(scores.sink[head]))
    return (z[:, None] * values[seen]).sum(0) / (z.sum() + sink)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.by}-{r.keep}")
@pytest.mark.parametrize(
    "scores", [Scores(0.3), Scores(0.5, 2.0, torch.linspace(-1, 1, HEADS))], ids=["plain", "capped"]
)
@torch.inference_mode()
def test_a_decode_step_is_what_the_loops_say(rule: Blocks, scores: Scores) -> None:
    (q, k, v), (step, layout) = drawn(), places()
    wanted = torch.stack([torch.stack([by_loops(rule, scores, r, h) for h in range(HEADS)]) for r in range(ROWS - 1)])
    for fields in ({"k": k, "v": v}, paged(k, v)):
        view = View(fields, layout)
        made = looked_into(rule, None, q, view, step, Sees())
        assert lookup.run(q, view, scores, made) is not None, "it is this path that answers"
        found = attend(q, view, step, Sees(), scores, made)
        torch.testing.assert_close(found[:-1], wanted, rtol=1e-9, atol=1e-9)
        assert not found[-1].any(), "padding sees nothing"


@torch.inference_mode()
def test_only_what_is_chosen_is_multiplied() -> None:
    rule, (q, k, v), (step, layout) = Blocks(by="bounds", size=3, keep=4), drawn(torch.float32), places()
    view = View({"k": k, "v": v}, layout)
    made = looked_into(rule, None, q, view, step, Sees())
    with FlopCounterMode(display=False) as counter:
        attend(q, view, step, Sees(), Scores(0.3), made)
    assert counter.get_total_flops() == 4 * ROWS * HEADS * SIZE * rule.multiplied(1, ENTRIES - 1)
    assert rule.multiplied(1, ENTRIES - 1) == 12 and rule.multiplied(1, 22) == 23


def test_gradients_take_the_other_path() -> None:
    """The same numbers by `gathered`."""
    rule, (q, k, v), (step, layout) = Blocks(by="mean", size=3, keep=4), drawn(), places()
    view = View({"k": k.requires_grad_(), "v": v}, layout)
    made = looked_into(rule, None, q, view, step, Sees())
    found = attend(q, view, step, Sees(), Scores(0.3), made)
    with torch.inference_mode():
        torch.testing.assert_close(found.detach(), attend(q, view, step, Sees(), Scores(0.3), made))
    assert torch.autograd.grad(found.sum(), k)[0].abs().sum() > 0
