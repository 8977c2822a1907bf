"""The flat axis seen by recurrences: lanes of tokens in order of time, each with what it starts from.

Legend: N tokens, L lanes of T places, B sequences, M saved tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from assay.ops.state import Rows
from assay.ops.step import Step


@dataclass(frozen=True)
class Lanes:
    """How a step's tokens stand in lanes. Made once a step by `lanes`.

    Without a memory (training), lanes are the rows of the grid, and a lane may hold several documents after one
    another: `segment` numbers them, and nothing may cross from one to the next. With a memory a lane is a sequence of
    the step, continues what is stored, and may end before the last place: what `lay` puts there is 0.
    """

    count: int
    length: int
    source: Int[Tensor, "P"] | None = None  # the token at each of the P = L * T places, N: none. None: token by token
    place: Int[Tensor, "N"] | None = None  # the place of each token, L * T: nowhere (padding)
    segment: Int[Tensor, "L T"] | None = None  # None: a lane is one sequence, which continues what is stored
    filled: Int[Tensor, "L"] | None = None  # how many places of a lane hold tokens; None: all
    saved: Int[Tensor, "M"] | None = None  # the lanes behind which states are kept; None: all, in their order

    def lay(self, x: Tensor) -> Tensor:
        """[N, ...] -> [L, T, ...]."""
        if self.source is not None:
            x = torch.cat([x, torch.zeros_like(x[:1])]).index_select(0, self.source)
        return x.reshape(self.count, self.length, *x.shape[1:])

    def flat(self, y: Tensor) -> Tensor:
        """[L, T, ...] -> [N, ...]; 0 for padding."""
        y = y.flatten(0, 1)
        return y if self.place is None else torch.cat([y, torch.zeros_like(y[:1])]).index_select(0, self.place)

    def start(self, rows: Rows) -> Tensor:
        """[L, ...]: the state each lane starts from."""
        return rows.read() if self.segment is None else rows.pool[:1].expand(self.count, *rows.pool.shape[1:])

    def rows(self, past: Tensor | Rows) -> Rows:
        """Where each lane's past stands."""
        if not isinstance(past, Tensor):
            return past
        return Rows(past, torch.arange(past.shape[0], device=past.device))

    def stored(self, rows: Rows) -> Tensor | Rows:
        """`start` for what reads it where it stands."""
        return rows if self.segment is None else self.start(rows)

    def fresh(self) -> Bool[Tensor, "L T"] | None:
        """The places where a document begins behind another one in its lane; None: nowhere."""
        return None if self.segment is None else F.pad(self.segment.diff(dim=1) > 0, (1, 0))

    def ends(self, states: Tensor, step: Step) -> Tensor:
        """[L, ...] after each lane -> [M, ...] for `State.store`: the saved tokens are each the last of a sequence."""
        if step.saves is not None and step.saves.shape[0] > self.count:
            raise ValueError(
                f"step.saves: {step.saves.shape[0]} tokens of {self.count} sequences; accepted: the last token of "
                "each, since states in between are not kept"
            )
        return states if self.saved is None else states.index_select(0, self.saved)

    def tails(self, padded: Tensor, size: int) -> Tensor:
        """[L, size + T, ...], what was before and this step's -> [L, size, ...]: the last of what is filled."""
        if self.filled is None:
            return padded[:, padded.shape[1] - size :]
        at = self.filled[:, None] + torch.arange(size, device=padded.device)
        return padded[torch.arange(self.count, device=padded.device)[:, None], at]


def lanes(step: Step, keeps: bool) -> Lanes:
    """The lanes of a step; `keeps` is the state's: whether anything outlives the step."""
    if not keeps:
        rows, length = step.grid or (1, step.tokens)
        seq = step.seq.view(rows, length)
        return Lanes(rows, length, segment=F.pad(seq.diff(dim=1) != 0, (1, 0)).cumsum(1))
    count, length = step.past.shape[0], step.longest
    saved = None if step.saves is None else step.seq.index_select(0, step.saves).clamp(min=0)
    saved = None if saved is None or in_order(saved, count) else saved
    if step.grid == (count, 1):
        return Lanes(count, 1, saved=saved)
    nowhere, device = count * length, step.seq.device
    real = step.seq >= 0
    lane = step.seq.clamp(min=0)
    place = torch.where(real, lane * length + step.index - step.past.index_select(0, lane), nowhere)
    if in_order(place, nowhere):
        return Lanes(count, length, saved=saved)
    source = torch.full((nowhere + 1,), step.tokens, dtype=torch.long, device=device)
    source = source.scatter(0, place, torch.arange(step.tokens, device=device))[:-1]
    filled = torch.zeros(count, dtype=torch.long, device=device).index_add(0, lane, real.long())
    return Lanes(count, length, source, place, None, filled, saved)


def in_order(x: Int[Tensor, "M"], count: int) -> bool:
    """Whether x is known to be 0, 1, ... count - 1: on a CPU, where a look costs no synchronisation."""
    if x.shape[0] != count or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.equal(x, torch.arange(count))
