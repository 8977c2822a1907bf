"""One step: tokens on one flat axis. A training batch, packed documents, a prefill and a decode are the same thing.

Legend: N tokens, B sequences, R x T rows and columns of the grid, S entries of a view, H query heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from assay.ops.state import State


@dataclass(frozen=True)
class Memory:
    """What cross-attention reads: features of the encoder's tokens, on a flat axis of their own."""

    h: Tensor
    seq: Int[Tensor, "M"]
    index: Int[Tensor, "M"]
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """Where the entries of a view stand: sequence (-1: empty), place in it, and position told to the scheme; [R, S]."""

    seq: Int[Tensor, "R S"]
    index: Int[Tensor, "R S"]
    positions: Int[Tensor, "R S"]
    aligned: bool  # row r holds all that the tokens of grid row r may see


@dataclass(frozen=True, eq=False)
class InPages(Mapping[str, Tensor]):
    """Fields in pages [P, page, ...], of which row r has those of table[r], one after another. A field that is asked
    for by its name is copied together; a kernel that follows the table reads it where it stands."""

    pools: Mapping[str, Tensor]
    table: Int[Tensor, "R _"]

    def __getitem__(self, name: str) -> Tensor:
        pool = self.pools[name]
        return pool.index_select(0, self.table.view(-1)).view(self.table.shape[0], -1, *pool.shape[2:])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pools)

    def __len__(self) -> int:
        return len(self.pools)


@dataclass(frozen=True)
class View:
    """Stored entries of one layer, as attention reads them: fields [R, S, ...] and their layout."""

    fields: Mapping[str, Tensor]
    layout: Layout

    def dense(self, name: str) -> Tensor:
        """The field as [R, S, ...]."""
        return self.fields[name]


@dataclass(frozen=True)
class Piece:
    """A run of a flat step's tokens, from token `first` on, as a step of its own with its own memory: all sequences
    that decode, or chunks of prompts of one length. Its sequences are numbered from 0."""

    first: int
    step: Step
    states: Mapping[str, State]

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.step.tokens)


@dataclass(frozen=True)
class RowsOf:
    """Which rows of a batch these are, where other processes hold the others: `own` rows from `first` on, of `rows` in
    all. total: the sum of everybody's tensor, through which gradients flow."""

    first: int
    own: int
    rows: int
    total: Callable[[Tensor], Tensor]

    def cut(self, whole: Tensor, length: int = 1) -> Tensor:
        """Its own part of what has `length` entries for each row of the batch. Rows behind the last one are padding,
        and get those of the last."""
        wanted = torch.arange(self.first, self.first + self.own, device=whole.device).clamp(max=self.rows - 1)
        return whole.unflatten(0, (self.rows, length)).index_select(0, wanted).flatten(0, 1)


@dataclass(frozen=True)
class Step:
    """What a layer is told about the tokens of this call; frozen and the same for all layers."""

    inputs: Mapping[str, Int[Tensor, "N"]]
    seq: Int[Tensor, "N"]
    index: Int[Tensor, "N"]
    positions: Int[Tensor, "N"]
    starts: Int[Tensor, "B1"]
    past: Int[Tensor, "B"]
    horizon: Int[Tensor, "B"]
    grid: tuple[int, int] | None = None
    decodes: int = 0
    longest: int = 0
    reach: int | None = None  # every position is below it; None: its maker did not say
    whole: bool = False  # each row of the grid is one sequence from its first token on; False: its maker did not say
    saves: Int[Tensor, "M"] | None = None
    emit: Int[Tensor, "E"] | None = None
    tree: Bool[Tensor, "N M"] | None = None
    prefix: Int[Tensor, "N"] | None = None  # the length of its sequence's prefix (`Sees.prefix`); None: there is none
    memory: Memory | None = None
    encode: Step | None = None  # tokens for the encoder of an encoder-decoder; it makes `memory`
    adapters: Int[Tensor, "N"] | None = None
    listen: frozenset[str] = frozenset()
    tables: Mapping[str, Any] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()  # all tokens, in order: parts with a memory take them one by one, others the whole
    part: RowsOf | None = None  # None: no other process holds tokens of this step
    attention: str = "auto"  # the backend of layers that have a choice; one that refuses it says so

    @property
    def ids(self) -> Int[Tensor, "N"]:
        return self.inputs["ids"]

    @property
    def tokens(self) -> int:
        return int(self.seq.shape[0])

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes that hold tokens of this step; the same for all of them."""
        return x if self.part is None else self.part.total(x)

    def table(self, part: Any) -> Any:
        """What this part's `prepare` returned for this step; None if it was not asked."""
        return self.tables.get(part.name)

    def with_(self, **changes: Any) -> Step:
        return replace(self, **changes)


def training_step(
    ids: Int[Tensor, "N"],
    seq: Int[Tensor, "N"],
    index: Int[Tensor, "N"],
    grid: tuple[int, int],
    horizon: int,
    listen: frozenset[str] = frozenset(),
    whole: bool = False,
) -> Step:
    """Rows of packed documents without a past, numbered by `seq`; length-dependent schemes plan for `horizon`."""
    # The number of sequences changes from batch to batch; nothing in training reads per-sequence tensors but these,
    # so they are given one entry a row and the program's shapes stay the same.
    rows = grid[0]
    starts = torch.arange(rows + 1, device=ids.device) * grid[1]
    past = torch.zeros(rows, dtype=torch.long, device=ids.device)
    horizons = torch.full_like(past, horizon)
    return Step(
        {"ids": ids}, seq, index, index, starts, past, horizons, grid, 0, grid[1], grid[1], listen=listen, whole=whole
    )


def rows_step(ids: Int[Tensor, "R T"], past: int = 0, horizon: int | None = None, **more: Any) -> Step:
    """One sequence a row, all of the same length, `past` tokens already stored."""
    rows, length = ids.shape
    index = torch.arange(past, past + length, device=ids.device).repeat(rows)
    seq = torch.arange(rows, device=ids.device).repeat_interleave(length)
    starts = torch.arange(rows + 1, device=ids.device) * length
    pasts = torch.full((rows,), past, device=ids.device)
    return Step(
        {"ids": ids.reshape(-1)},
        seq,
        index,
        index,
        starts,
        pasts,
        torch.full_like(pasts, horizon if horizon is not None else past + length),
        (rows, length),
        rows if length == 1 else 0,
        length,
        past + length,
        saves=starts[1:] - 1,
        **more,
    )


def prefixed(step: Step, lengths: Int[Tensor, "B"]) -> Step:
    """The step with a prefix of lengths[b] tokens in sequence b, which layers with `Sees.prefix` read both ways.

    Such a prefix comes in one step: its tokens see those after them, which a later step brings too late. ValueError
    where a sequence brings a part of its prefix, or where its prefix ends behind what is stored. It looks at values, so
    it is for who makes steps with `starts` of sequences, and not for a forward.
    """
    new = step.starts.diff().to(lengths.device)
    if lengths.shape != new.shape:
        raise ValueError(f"prefix: {lengths.shape[0]} lengths; the step has {new.shape[0]} sequences")
    past = step.past.to(lengths.device)
    whole = (lengths <= past) | ((past == 0) & (lengths <= new))
    if not bool(whole.all()):
        b = int((~whole).nonzero()[0])
        raise ValueError(
            f"prefix: sequence {b} has a prefix of {int(lengths[b])} tokens and brings {int(new[b])} after "
            f"{int(past[b])}; accepted: the whole prefix in the sequence's first step"
        )
    return step.with_(prefix=lengths.repeat_interleave(new))


def joined(pieces: Sequence[Piece]) -> Step:
    """The flat step of these pieces, which follow one another. Logits are of what each of them emits."""
    steps = [piece.step for piece in pieces]
    counts = [0, *(int(s.past.shape[0]) for s in steps)]
    firsts = [sum(counts[: i + 1]) for i in range(len(steps))]

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(s, name) for s in steps])

    starts = [s.starts[:-1] + p.first for s, p in zip(steps, pieces, strict=True)]
    emits = [
        p.first + (s.emit if s.emit is not None else torch.arange(s.tokens, device=s.seq.device))
        for s, p in zip(steps, pieces, strict=True)
    ]
    return Step(
        {name: torch.cat([s.inputs[name] for s in steps]) for name in steps[0].inputs},
        torch.cat([torch.where(s.seq >= 0, s.seq + n, -1) for s, n in zip(steps, firsts, strict=True)]),
        cat("index"),
        cat("positions"),
        torch.cat([*starts, steps[-1].starts[-1:] + pieces[-1].first]),
        cat("past"),
        cat("horizon"),
        decodes=steps[0].decodes,
        longest=max(s.longest for s in steps),
        emit=torch.cat(emits),
        pieces=tuple(pieces),
    )
