"""Attention in which a token's bits follow from its own sequence alone: not from who else is in the step, how its
prompt was cut, or where its keys are stored.

Sums are made over keys in pieces of 128 that begin at multiples of 128 of their places in the sequence. The compiled
kernel, which works in such pieces, serves any number of queries, each as a row of its own; what it does not serve (a
bias, a mask of each head's own, odd sizes of heads) takes torch's products, one query at a time, of fixed shapes.

Legend: R x T rows and columns of the queries, S entries of the view, n queries and L places of one sequence, H query
heads, G key heads, K and V head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from assay.ops.attend import decode
from assay.ops.attend.plan import Plan, aligned, by_head, visible
from assay.ops.attend.rule import Scores
from assay.ops.native import serving
from assay.ops.precision import high
from assay.ops.sees import Sees
from assay.ops.step import Step, View

PIECE, QUERIES = 128, 32  # what the kernel takes: keys of a piece, queries of a call


def asked() -> bool:
    """In inference, once `torch.use_deterministic_algorithms` is on."""
    return torch.are_deterministic_algorithms_enabled() and torch.is_inference_mode_enabled()


def run(
    q: Float[Tensor, "N H K"], view: View, step: Step, sees: Sees, scores: Scores, made: Plan | None
) -> Float[Tensor, "N H V"]:
    """softmax(scores + mask) v of every token and head; a token that sees nothing gives 0."""
    found = decode.run(q, view, scores, made) if _from_zero(q, view) else None
    if found is not None:
        return found
    q_seq, _, q_pos, k_seq, k_index, k_pos = aligned(step, view.layout)
    rows = k_seq.shape[0]
    mask = visible(step, view.layout, sees) if made is None or made.mask is None else made.mask
    queries = q.view(rows, -1, *q.shape[1:])
    k, v = (t.reshape(rows, -1, *t.shape[2:]) for t in (view.dense("k"), view.dense("v")))
    out = q.new_zeros(*queries.shape[:3], v.shape[-1])
    for row in range(rows):
        for seq in q_seq[row].unique().tolist():
            if seq < 0:
                continue
            mine, entries = ((t == seq).nonzero()[:, 0] for t in (q_seq[row], k_seq[row]))
            if not len(entries):
                continue
            keys = Keys.of(k[row, entries], v[row, entries], k_index[row, entries], k_pos[row, entries])
            shown = by_head(mask[row : row + 1], q.shape[1])[0][:, mine][..., entries]
            out[row, mine] = keys.mixed(queries[row, mine], q_pos[row, mine], keys.spread(shown), scores)
    return out.flatten(0, 1)


def _from_zero(q: Tensor, view: View) -> bool:
    """Whether each row is one query and its entries stand at their own places: the kernel's pieces are then these."""
    layout = view.layout
    if not layout.aligned or layout.seq.shape[0] != q.shape[0]:
        return False
    places = torch.arange(layout.index.shape[1], device=q.device)
    return bool(((layout.index == places) | (layout.index < 0)).all())


@dataclass(frozen=True)
class Keys:
    """One sequence's keys, values and positions, each at its place from `first` on; what is missing is 0."""

    place: Int[Tensor, "s"]
    k: Float[Tensor, "L G K"]
    v: Float[Tensor, "L G V"]
    positions: Int[Tensor, "L"]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, index: Tensor, positions: Tensor) -> Keys:
        first = int(index.min()) // PIECE * PIECE
        size = -(-(int(index.max()) + 1 - first) // PIECE) * PIECE
        place = index - first
        return cls(place, *(t.new_zeros(size, *t.shape[1:]).index_copy_(0, place, t) for t in (k, v, positions)))

    def spread(self, shown: Bool[Tensor, "h n s"]) -> Bool[Tensor, "h n L"]:
        """What a mask shows of the entries, at their places; h is 1 or H."""
        return shown.new_zeros(*shown.shape[:2], len(self.k)).index_copy_(2, self.place, shown)

    def mixed(
        self, q: Float[Tensor, "n H K"], q_pos: Int[Tensor, "n"], shown: Bool[Tensor, "h n L"], scores: Scores
    ) -> Float[Tensor, "n H V"]:
        found = self._compiled(q, shown[0], scores) if len(shown) == 1 else None
        if found is not None:
            return found
        pieces = [self._piece(first) for first in range(0, len(self.k), PIECE)]
        rows = [_one(q[i], q_pos[i], pieces, shown[:, i], scores) for i in range(len(q))]
        return torch.stack(rows).to(self.v.dtype)

    def _compiled(self, q: Tensor, shown: Bool[Tensor, "n L"], scores: Scores) -> Tensor | None:
        native = None if scores.bias is not None or scores.dropout else serving(q)
        if native is None:
            return None
        rule, out = (scores.scale, scores.softcap, scores.sink), []
        for part, seen in zip(q.split(QUERIES), shown.split(QUERIES), strict=True):
            stored = self.k.expand(len(part), *self.k.shape), self.v.expand(len(part), *self.v.shape)
            found = native.attend(part, stored, seen.contiguous(), *rule)
            if found is None:
                return None
            out.append(found)
        return torch.cat(out)

    def _piece(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """k [G, K, 128], v [G, 128, V] and positions [1, 128], in memory of their own."""
        part = slice(first, first + PIECE)
        k, v = high(self.k[part]).permute(1, 2, 0).contiguous(), high(self.v[part]).transpose(0, 1).contiguous()
        return k, v, self.positions[part].clone()[None]


def _one(
    q: Float[Tensor, "H K"],
    q_pos: Tensor,
    pieces: list[tuple[Tensor, Tensor, Tensor]],
    shown: Bool[Tensor, "h L"],
    scores: Scores,
) -> Float[Tensor, "H V"]:
    """One query over the pieces that it sees something of, from the first to the last."""
    heads, groups = q.shape[0], pieces[0][0].shape[0]
    q = high(q).contiguous()
    logits: list[tuple[Tensor, Tensor]] = []
    for number, (k, v, k_pos) in enumerate(pieces):
        seen = shown[:, number * PIECE : (number + 1) * PIECE]
        if bool(seen.any()):
            raw = (q.view(groups, -1, q.shape[1]) @ k).view(1, heads, 1, PIECE)
            z = scores.logits(raw, q.view(1, heads, 1, -1), q_pos.view(1, 1, 1), k_pos.view(1, 1, PIECE))
            logits.append((z.view(heads, PIECE).masked_fill(~seen, float("-inf")), v))
    top = q.new_full((heads, 1), float("-inf")) if scores.sink is None else high(scores.sink).view(heads, 1)
    for z, _ in logits:
        top = torch.maximum(top, z.amax(-1, keepdim=True))
    top = top.clamp(min=torch.finfo(top.dtype).min)
    total = torch.zeros_like(top) if scores.sink is None else torch.exp(high(scores.sink).view(heads, 1) - top)
    out = q.new_zeros(heads, pieces[0][1].shape[-1])
    for z, v in logits:
        p = torch.exp(z - top)
        total = total + p.sum(-1, keepdim=True)
        out = out + (p.view(groups, -1, PIECE) @ v).view(heads, -1)
    return out / total.where(total > 0, 1.0)
