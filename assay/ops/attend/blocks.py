"""Blocks of keys that stand for what is in them: which of them a query looks into.

Legend: R x T rows and columns of the queries, S entries of the view, C complete blocks of a row, H query heads, G key
heads, P = H / G, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from assay.ops.attend.parts import SMALLEST, Part
from assay.ops.attend.plan import Plan, aligned, materialised, may_gather, narrowed
from assay.ops.sees import Sees
from assay.ops.step import Layout, Step, View
from assay.spec.base import Spec

CAUSAL = Sees()
# A part of own blocks holds about so many logits.
LOGITS = 1 << 19


class Blocks(Spec):
    """A query attends to `keep` blocks of `size` tokens: its own, as far as it goes, and the best of those before it.

    by: what a block is worth to a query. `mean` is q times the mean of its keys (mixture of block attention; Lu et al.
    2025, arXiv 2502.13189, equations 5 and 6). `bounds` is the sum over dimensions of the larger of q min and q max,
    which no q k in the block exceeds (Quest; Tang et al. 2024, arXiv 2406.10774, section 3.3): there `size` is the
    page and `keep` the budget in pages. Each query head chooses for itself, by keys that are turned; of equal blocks
    the earlier. A choice has no gradient.
    """

    by: Literal["mean", "bounds"] = "mean"
    size: int = Field(default=512, ge=1)
    keep: int = Field(default=3, ge=1)

    def narrows(self, entries: int) -> bool:
        """Whether a token that could see this many keys sees fewer."""
        return entries > self.size * self.keep

    def gathers(self, new: int, entries: int) -> bool:
        """Whether so many queries, of whom each could see so many keys, are multiplied with what they choose alone."""
        return entries >= 2 * self.size * self.keep and (new == 1 or new * entries >= SMALLEST)

    def multiplied(self, new: int, seen: int) -> int:
        """(query, key) pairs that are multiplied where blocks are gathered: the chosen blocks, which are full, and the
        squares of the queries' own, of one query the whole budget; else the square."""
        if not self.gathers(new, new + seen):
            return new * (new + seen)
        if new == 1:
            return self.keep * self.size
        chosen = sum(min(self.keep - 1, i // self.size) * self.size for i in range(seen, seen + new))
        own = (new + seen - 1) // self.size - seen // self.size + 1
        return chosen + own * min(self.size, new) * self.size

    def pairs(self, new: int, seen: int) -> int:
        """(query, key) pairs when `new` tokens arrive after `seen` others; exact, since earlier blocks are full."""
        return sum(min(self.keep - 1, i // self.size) * self.size + i % self.size + 1 for i in range(seen, seen + new))

    def scored(self, new: int, seen: int) -> int:
        """(query, block) pairs that are weighed: the earlier blocks of each query, none where all would be chosen."""
        each = 1 if self.by == "mean" else 2
        return each * sum(i // self.size for i in range(seen, seen + new)) if self.narrows(new + seen) else 0

    def executed(self, new: int, seen: int) -> int:
        """What is multiplied for it: every query with every block of the view."""
        return (1 if self.by == "mean" else 2) * new * ((new + seen) // self.size) if self.narrows(new + seen) else 0

    def worth(self, q: Float[Tensor, "R T H K"], keys: Float[Tensor, "R C B G K"]) -> Float[Tensor, "R H T C"]:
        """What each block is worth to each query, in float32 or better: near ties decide what is seen."""
        high = torch.promote_types(q.dtype, torch.float32)
        q, keys = q.to(high), keys.to(high)
        if self.by == "mean":
            return products(q, keys.mean(2))
        return products(q.clamp(min=0), keys.amax(2)) + products(q.clamp(max=0), keys.amin(2))


def products(q: Float[Tensor, "R T H K"], k: Float[Tensor, "R C G K"]) -> Float[Tensor, "R H T C"]:
    """q k of each query head with the keys of its group."""
    (rows, tokens, heads, size), (_, count, groups, _) = q.shape, k.shape
    q = q.transpose(1, 2).reshape(rows, groups, heads // groups * tokens, size)
    return (q @ k.permute(0, 2, 3, 1)).view(rows, heads, tokens, count)


@dataclass(frozen=True)
class Runs:
    """Where the complete blocks of a view stand: `size` entries from every `stride`-th place of a sequence on.

    first, last: the entries of the row that begin and end a block; a row has at most S / stride, and what is left over
    is not `real`. seq: whose they are; end: the place of the last token in its sequence.
    """

    size: int
    first: Int[Tensor, "R C"]
    real: Bool[Tensor, "R C"]
    seq: Int[Tensor, "R C"]
    end: Int[Tensor, "R C"]

    @property
    def last(self) -> Int[Tensor, "R C"]:
        return self.first + self.size - 1

    def of(self, entries: Float[Tensor, "R S *E"]) -> Float[Tensor, "R C B *E"]:
        """The entries of each block; some other entries for one that is not real."""
        rows, count = self.first.shape
        inside = self.first[..., None] + torch.arange(self.size, device=self.first.device)
        row = torch.arange(rows, device=inside.device)[:, None, None] * entries.shape[1]
        found = entries.flatten(0, 1).index_select(0, (row + inside).flatten())
        return found.view(rows, count, self.size, *entries.shape[2:])

    def before(self, seq: Int[Tensor, "R T"], place: Int[Tensor, "R T"]) -> Bool[Tensor, "R T C"]:
        """Which blocks end before the place of each query in its own sequence."""
        return (self.seq[:, None] == seq[..., None]) & self.real[:, None] & (self.end[:, None] < place[..., None])

    def spread(self, chosen: Bool[Tensor, "R H T C"], entries: int) -> Bool[Tensor, "R H T S"]:
        """The entries of the chosen blocks, of blocks that do not overlap."""
        rows, count = self.first.shape
        inside = self.first[..., None] + torch.arange(self.size, device=self.first.device)
        inside = torch.where(self.real[..., None], inside, entries).view(rows, -1)
        number = torch.arange(count, device=inside.device).repeat_interleave(self.size).expand(rows, -1)
        nobody = torch.full((rows, entries + 1), count, dtype=torch.long, device=inside.device)
        block = nobody.scatter(1, inside, number)[:, None, None, :entries]
        chosen = torch.cat([chosen, torch.zeros_like(chosen[..., :1])], -1)
        return chosen.gather(-1, block.expand(*chosen.shape[:3], -1))


def runs(layout: Layout, rows: int, size: int, stride: int) -> Runs:
    """The complete blocks of a view, which is read in `rows` rows; a sequence stands there in order, in one piece."""
    seq, index = layout.seq.reshape(rows, -1), layout.index.reshape(rows, -1)
    entries, device = seq.shape[1], seq.device
    count, width = entries // stride if entries >= size else 0, max(entries - size + 1, 0)
    tail, far = seq[:, size - 1 :], index[:, size - 1 :]
    head, near = seq[:, :width], index[:, :width]
    whole = (head == tail) & (head >= 0) & (far - near == size - 1) & (near % stride == 0)
    # A scatter in order: block number i of a row stands at i, and what is no block beyond all of them.
    number = torch.where(whole, whole.cumsum(1) - 1, count)
    first = torch.zeros(rows, count + 1, dtype=torch.long, device=device)
    first = first.scatter(1, number, torch.arange(width, device=device).expand(rows, -1))[:, :count]
    real = torch.arange(count, device=device) < whole.sum(1, keepdim=True)
    first = torch.where(real, first, 0)
    return Runs(size, first, real, seq.gather(1, first), index.gather(1, first) + size - 1)


def best(worth: Float[Tensor, "R G T C"], can: Bool[Tensor, "R T C"], keep: int) -> Bool[Tensor, "R G T C"]:
    """The `keep` blocks of largest worth among those that can be chosen; of equal ones the earlier."""
    worth = worth.masked_fill(~can[:, None], float("-inf"))
    # A stable sort and not `topk`, whose choice among equals depends on the shape.
    first = worth.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, first, True) & can[:, None]


def entered(found: Runs, picked: Bool[Tensor, "R G T C"], step: Step, layout: Layout) -> Bool[Tensor, "R G T S"]:
    """The entries in the blocks that each query picks and in its own block, past the query too."""
    q_seq, q_index, _, k_seq, k_index, _ = aligned(step, layout)
    q_block, k_block = (t.div(found.size, rounding_mode="floor") for t in (q_index, k_index))
    own = (q_seq[..., None] == k_seq[:, None]) & (q_block[..., None] == k_block[:, None])
    return found.spread(picked, k_seq.shape[1]) | own[:, None]


@torch.no_grad()
def choices(
    rule: Blocks, q: Float[Tensor, "N H K"], k: Float[Tensor, "Q V G K"], step: Step, layout: Layout
) -> tuple[Runs, Bool[Tensor, "R H T C"]]:
    """The blocks of the view, and which of them each query head chooses beside the query's own."""
    q_seq, q_index, _, k_seq, _, _ = aligned(step, layout)
    rows, entries = k_seq.shape
    found = runs(layout, rows, rule.size, rule.size)
    worth = rule.worth(q.view(rows, -1, *q.shape[1:]), found.of(k.reshape(rows, entries, *k.shape[2:])))
    before = found.before(q_seq, q_index // rule.size * rule.size)
    return found, best(worth, before, rule.keep - 1)


def gathers(rule: Blocks, step: Step, layout: Layout) -> bool:
    """Whether chosen blocks are multiplied alone, and the square is not made."""
    rows = layout.seq.shape[0] if layout.aligned else 1
    new = step.tokens // rows
    large = (step.longest == 1) == (new == 1) and rule.gathers(new, layout.seq.numel() // rows)
    return large and may_gather(step.seq)


@torch.no_grad()
def chosen(
    rule: Blocks, q: Float[Tensor, "N H K"], k: Float[Tensor, "Q V G K"], step: Step, layout: Layout
) -> Bool[Tensor, "R H T S"]:
    """Which entries of the view are in a block that a query head chooses, or in the query's own."""
    return entered(*choices(rule, q, k, step, layout), step, layout)


def within(allowed: Bool[Tensor, "R G T S"], made: Plan | None, step: Step, layout: Layout, sees: Sees) -> Plan:
    """The step's plan for a layer whose queries see what is allowed, of what the rule shows."""
    if made is None or made.mask is None:
        made = materialised(step, layout, sees, "auto" if made is None else made.backend)
    assert made.mask is not None
    return narrowed(made, allowed & made.mask[:, None])


def opened(
    rule: Blocks,
    found: Runs,
    picked: Bool[Tensor, "R G T C"],
    made: Plan | None,
    step: Step,
    view: View,
    sees: Sees = CAUSAL,
) -> Plan:
    """The step's plan for a layer whose queries see the blocks they picked and their own, of what the rule shows."""
    layout, groups = view.layout, view.dense("k").shape[2]
    backend = "auto" if made is None else made.backend
    if backend == "auto" and sees == CAUSAL and gathers(rule, step, layout):
        heads = picked.shape[1]
        if picked.shape[2] == 1:
            parts: tuple[Part, ...] = (one_part(rule, found, picked, step, layout, groups),)
        else:
            own = own_parts(rule.size, heads, step, layout, groups)
            parts = (*chosen_parts(found, picked, layout, groups), *own)
        return Plan(backend, parts=parts, by_head=heads, allowed=lambda: entered(found, picked, step, layout))
    return within(entered(found, picked, step, layout), made, step, layout, sees)


def one_part(
    rule: Blocks, found: Runs, picked: Bool[Tensor, "R G 1 C"], step: Step, layout: Layout, groups: int
) -> Part:
    """Of one query a row: the `keep` - 1 blocks that it picks, by head, and its own up to it, of a size that no content
    decides."""
    q_seq, q_index, _, k_seq, k_index, _ = aligned(step, layout)
    (rows, entries), heads, inside = k_seq.shape, picked.shape[1], torch.arange(rule.size)
    block = picked[:, :, 0].byte().sort(dim=-1, descending=True, stable=True).indices[..., : rule.keep - 1]
    there = picked[:, :, 0].gather(-1, block)[..., None].expand(*block.shape, rule.size)
    far = found.first[:, None].expand(rows, heads, -1).gather(-1, block)[..., None] + inside
    begins = q_index // rule.size * rule.size
    first = ((k_seq == q_seq) & (k_index == begins)).byte().argmax(1, keepdim=True)
    near, seen = first + inside, (begins + inside <= q_index) & (q_seq >= 0)
    near, seen = (t[:, None].expand(rows, heads, -1) for t in (near.clamp(max=entries - 1), seen))
    group = torch.arange(rows)[:, None] * groups + torch.arange(heads) // (heads // groups)
    k = group[..., None] * entries + torch.cat([far.flatten(2), near], 2)
    mask = torch.cat([there.flatten(2), seen], 2)
    return Part(torch.arange(rows * heads)[:, None], k.flatten(0, 1), mask.flatten(0, 1)[None, :, None])


def chosen_parts(found: Runs, picked: Bool[Tensor, "R G T C"], layout: Layout, groups: int) -> Iterator[Part]:
    """A part for each block that somebody picks: all who do, by head, with its keys, all of which they see."""
    rows, heads, tokens, _ = picked.shape
    entries = layout.seq.numel() // rows
    inside = torch.arange(found.size)
    number, block, place = picked.flatten(0, 1).transpose(1, 2).nonzero(as_tuple=True)
    asking = number * tokens + place
    wanted, counts = torch.stack([number, block]).unique_consecutive(dim=1, return_counts=True)
    row, group = wanted[0] // heads, wanted[0] % heads // (heads // groups)
    first = found.first[row, wanted[1]] + (row * groups + group) * entries
    for q, start in zip(asking.split(counts.tolist()), first.tolist(), strict=True):
        yield Part(q[None], (start + inside)[None], None)


def own_parts(size: int, heads: int, step: Step, layout: Layout, groups: int) -> Iterator[Part]:
    """Every query with the keys of its own block up to its own, by head, in squares of `size`."""
    q_seq, q_index, _, k_seq, k_index, _ = aligned(step, layout)
    (rows, tokens), entries = q_seq.shape, k_seq.shape[1]
    row = torch.arange(rows)[:, None]
    apart = int(torch.maximum(q_index.max(), k_index.max())) // size + 1
    many = int(torch.maximum(q_seq.max(), k_seq.max())) + 1

    def segments(seq: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which block of which sequence of which row the tokens are of, and where they stand, -1 for no token."""
        number = torch.where(seq < 0, -1, (row * many + seq) * apart + index.div(size, rounding_mode="floor"))
        return number.flatten(), torch.arange(number.numel())

    (q_number, q_at), (k_number, k_at) = segments(q_seq, q_index), segments(k_seq, k_index)
    names = q_number.unique()
    names = names[names >= 0]
    q, k = (table(names, number, at, size) for number, at in ((q_number, q_at), (k_number, k_at)))
    mask = (q >= 0)[..., None] & (k >= 0)[:, None] & (k_index.flatten()[k][:, None] <= q_index.flatten()[q][..., None])
    width = min(size, tokens)
    q, mask = q[:, :width], mask[:, :width]
    head = torch.arange(heads)[:, None, None]
    of_head = (q // tokens * heads + head) * tokens + q % tokens
    of_group = (k // entries * groups + head // (heads // groups)) * entries + k % entries
    q = torch.where(q >= 0, of_head, rows * heads * tokens).flatten(0, 1)
    k = of_group.where(k >= 0, 0).flatten(0, 1)
    mask = mask.expand(heads, *mask.shape).flatten(0, 1)
    step_by = max(1, LOGITS // (width * size))
    for i in range(0, len(q), step_by):
        yield Part(q[i : i + step_by], k[i : i + step_by], mask[None, i : i + step_by])


def table(names: Int[Tensor, "B"], number: Int[Tensor, "N"], at: Int[Tensor, "N"], size: int) -> Int[Tensor, "B s"]:
    """Where the tokens of each numbered block stand, in their order; -1 behind its last."""
    order = number.argsort(stable=True)
    first = torch.searchsorted(number[order], names)[:, None] + torch.arange(size)
    read = first.clamp(max=len(order) - 1)
    return torch.where((first < len(order)) & (number[order][read] == names[:, None]), at[order][read], -1)


def looked_into(
    rule: Blocks, made: Plan | None, q: Float[Tensor, "N H K"], view: View, step: Step, sees: Sees
) -> Plan | None:
    """The step's plan for a layer whose queries choose blocks; as it is where every block would be chosen."""
    if not rule.narrows(view.layout.seq.shape[1]):
        return made
    return opened(rule, *choices(rule, q, view.dense("k"), step, view.layout), made, step, view, sees)
