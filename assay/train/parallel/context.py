"""Context parallelism: every rank has some columns of each row, and the state between parts is what crosses.

Attention: keys and values (or whatever a part appends) are gathered from all ranks before they are read, and their
gradients go back by a sum (Llama Team 2024, arXiv 2407.21783, section 3.3.2), with every mask, selector and packed
document, since only layouts decide what is seen; or they go from rank to rank (`ring`).
Recurrences: the state behind a rank's columns goes on to the next rank. Parts know neither: both are
`State`s (`assay.ops.state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assay.model.lm import LM, Forgetting, Output
from assay.ops.state import Rows, State, dtype_of
from assay.ops.step import Layout, Step, View
from assay.spec.base import StateField
from assay.spec.model import ModelSpec
from assay.train.parallel.exchange import Line, gathered
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.plan import refuse_dropout, refuse_encoder
from assay.train.parallel.ring import Around, Joined, Ring


@dataclass(frozen=True)
class Columns:
    """Which columns of the rows are whose: [ranks, T / ranks]. In order, or `folded`: rank r has pieces r and
    2n - 1 - r of 2n, so that causal attention costs all ranks the same."""

    places: Tensor

    @classmethod
    def of(cls, length: int, ranks: int, folded: bool) -> Columns:
        pieces = 2 * ranks if folded else ranks
        if length % pieces:
            raise ValueError(
                f"recipe.batch.length: {length}; with parallel.context={ranks} a multiple of {pieces} is accepted"
            )
        cut = torch.arange(length).view(pieces, -1)
        return cls(torch.cat([cut[:ranks], cut[ranks:].flip(0)], 1) if folded else cut)


@dataclass(frozen=True)
class Now:
    """A step as this rank has it. layout: of whole rows. back: where each token of a row stands in what all ranks have,
    one after another. first, last: the numbers of the sequences at the ends of this rank's rows; goes_on: which rows
    begin in the middle of one."""

    step: Step
    targets: Tensor | None
    layout: Layout
    back: Tensor
    first: Tensor
    last: Tensor
    goes_on: Tensor
    loose: list[Tensor]
    around: Around | None = None


def narrowed(step: Step, targets: Tensor | None, columns: Columns, rank: int, order: bool) -> Now:
    """This rank's columns of a step of whole rows. order: sequences are numbered anew, 0, 1, ... in the order they
    stand here, and continue what is stored, as recurrences need."""
    assert step.grid is not None
    rows, length = step.grid
    here = columns.places[rank].to(step.seq.device)

    def pick(x: Tensor) -> Tensor:
        return x.view(rows, length)[:, here].reshape(-1)

    seq, index = pick(step.seq), pick(step.index)
    begins = torch.cat([seq[:1] == seq[:1], seq.diff() != 0]).view(rows, -1)
    begins[:, 0] = True
    number = begins.flatten().cumsum(0) - 1
    edge = number.view(rows, -1)
    start = begins.flatten().nonzero()[:, 0]
    told, theirs = seq, step.seq
    if order:
        told = number.where(seq >= 0, -1)
        lookup = torch.full((int(step.seq.max()) + 2,), -1, dtype=told.dtype, device=told.device)
        theirs = lookup.index_copy(0, seq + 1, told)[theirs + 1]
    local = step.with_(
        inputs={name: pick(x) for name, x in step.inputs.items()},
        seq=told,
        index=index,
        positions=pick(step.positions),
        starts=torch.cat([start, start.new_tensor([len(seq)])]),
        past=index[start],
        horizon=step.horizon[:1].expand(len(start)),
        grid=(rows, len(here)),
        longest=int(start.diff(append=start.new_tensor([len(seq)])).max()),
        whole=False,
        prefix=None if step.prefix is None else pick(step.prefix),
    )
    shape = (rows, length)
    layout = Layout(theirs.view(shape), step.index.view(shape), step.positions.view(shape), True)
    goes_on = (index.view(rows, -1)[:, 0] > 0) & (seq.view(rows, -1)[:, 0] >= 0) & (rank > 0)
    kept = None if targets is None else pick(targets)
    back = columns.places.flatten().argsort().to(step.seq.device)
    return Now(local, kept, layout, back, edge[:, 0], edge[:, -1], goes_on, [])


class Received(torch.autograd.Function):
    """y = what the rank before sent; its gradient goes back there. `anchor` only makes it a node of the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor, line: Line) -> Tensor:
        ctx.line = line
        into = torch.empty_like(like)
        line.comm.receive(into, line.rank - 1, line.group)
        return into

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.line.comm.send(grads[0].contiguous(), ctx.line.rank - 1, ctx.line.group)
        return None, None, None


class Passed(torch.autograd.Function):
    """Sends x to the next rank; 0, of which x's gradient is what comes back from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line) -> Tensor:
        ctx.line = line
        ctx.save_for_backward(x)
        line.comm.send(x.detach().contiguous(), line.rank + 1, line.group)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        into = torch.empty_like(ctx.saved_tensors[0])
        ctx.line.comm.receive(into, ctx.line.rank + 1, ctx.line.group)
        return into, None


class Spread:
    """One part's state: `append` gathers, `load` receives and `store` passes on."""

    def __init__(self, fields: tuple[StateField, ...], like: Tensor, line: Line, now: Now) -> None:
        self.fields = {f.name: f for f in fields}
        self.keeps = any(f.per == "sequence" for f in fields)
        self.like, self.line, self.now = like, line, now
        self._begun: dict[str, Tensor] | None = None
        self._ends: dict[str, Tensor] = {}

    def layout(self, step: Step) -> Layout:
        return self.now.layout

    def append(self, step: Step, **new: Tensor) -> View:
        """With `ring`, what attention reads as it is stored goes from rank to rank; else all is gathered here."""
        if self.now.around is None:
            return View(self._gathered(step, new), self.now.layout)
        joined = Joined(tuple(new), partial(self._gathered, step, new))
        return Ring(joined, self.now.layout, new, self.line, self.now.around)

    def _gathered(self, step: Step, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One exchange for all fields: their entries side by side."""
        assert step.grid is not None
        rows, own = step.grid
        flat = torch.cat([x.reshape(rows * own, -1) for x in new.values()], -1)
        every = gathered(flat, self.line).view(self.line.ranks, rows, own, -1)
        every = every.transpose(0, 1).reshape(rows, self.line.ranks * own, -1).index_select(1, self.now.back)
        cut = every.split([x[0].numel() for x in new.values()], -1)
        return {n: c.view(*c.shape[:2], *x.shape[1:]) for (n, x), c in zip(new.items(), cut, strict=True)}

    def view(self, step: Step) -> View:
        raise ValueError("cross-attention has a memory: parallel.context=1 is accepted")

    def load(self, name: str, step: Step) -> Rows:
        """The first one receives all fields, in one message: parts load and store them in orders of their own."""
        if self._begun is None:
            self._begun = self._received()
        begun, field, first = self._begun[name], self.fields[name], self.now.first
        pool = torch.full((step.past.shape[0], *field.shape), field.init, dtype=begun.dtype, device=begun.device)
        goes_on = self.now.goes_on.view(-1, *[1] * len(field.shape))
        pool = pool.index_copy(0, first, torch.where(goes_on, begun, pool.index_select(0, first)))
        return Rows(pool, torch.arange(step.past.shape[0], device=pool.device))

    def store(self, step: Step, **rows: Tensor) -> None:
        """The last one sends all fields. After it the state is as new: a block that is computed again for the backward
        pass receives and sends again, as its neighbours do."""
        self._ends |= {name: value.index_select(0, self.now.last) for name, value in rows.items()}
        if self._ends.keys() != self._kept.keys():
            return
        if self.line.rank < self.line.ranks - 1:
            flat = torch.cat([self._ends[name].flatten(1).to(self._dtype) for name in self._kept], 1)
            self.now.loose.append(Passed.apply(flat, self.line))
        self._begun, self._ends = None, {}

    @property
    def _kept(self) -> dict[str, StateField]:
        return {name: f for name, f in self.fields.items() if f.per == "sequence"}

    @property
    def _dtype(self) -> torch.dtype:
        """That of the highest precision among the fields and the model."""
        found = self.like.dtype
        for field in self._kept.values():
            found = torch.promote_types(found, dtype_of(field, self.like.dtype))
        return found

    def _received(self) -> dict[str, Tensor]:
        """What each row's first sequence begins with, [R, ...]; nothing is read of it on the first rank."""
        rows, sizes = self.now.first.shape[0], {name: math.prod(f.shape) for name, f in self._kept.items()}
        flat = self.like.new_zeros((rows, sum(sizes.values())), dtype=self._dtype)
        if self.line.rank > 0:
            anchor = flat.new_zeros((), requires_grad=torch.is_grad_enabled())
            flat = Received.apply(anchor, flat, self.line)
        parts = zip(self._kept.items(), flat.split(list(sizes.values()), 1), strict=True)
        return {name: part.view(rows, *field.shape) for (name, field), part in parts}


class Context:
    """Narrows what a model is called with, gives its parts their states, and puts its logits together."""

    def __init__(self, line: Line, fields: Mapping[str, tuple[StateField, ...]], ring: bool) -> None:
        self.line, self.fields, self.ring = line, fields, ring
        self.order = any(f.per == "sequence" for group in fields.values() for f in group)
        self._now: Now | None = None

    @property
    def now(self) -> Now:
        assert self._now is not None, "states are made inside of the model's call"
        return self._now

    def enter(self, module: object, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        step, *rest = args
        columns = Columns.of(step.grid[1], self.line.ranks, not self.order)
        now = narrowed(step, given.get("targets"), columns, self.line.rank, self.order)
        self._now = replace(now, around=Around.of(now.layout, columns.places)) if self.ring else now
        return (self._now.step, *rest), {**given, "targets": self._now.targets}

    def leave(self, module: object, args: Any, given: Any, out: Output) -> Output:
        now, self._now = self.now, None
        if out.loss is not None:
            objective = sum(now.loose, out.loss["objective"])
            return replace(out, loss={**out.loss, "objective": objective})
        if out.logits is None:
            return out
        rows, own = now.step.grid or (1, 0)
        every = self.line.gathered_up(out.logits).view(self.line.ranks, rows, own, -1).transpose(0, 1)
        return replace(out, logits=every.flatten(1, 2)[:, now.back].flatten(0, 1))

    def __call__(self, step: Step, like: Tensor) -> dict[str, State]:
        return {name: Spread(f, like, self.line, self.now) for name, f in self.fields.items()}


def refuse(spec: ModelSpec, ranks: int) -> None:
    """ValueError, by name, for a part whose rows cannot be spread."""
    refuse_encoder(spec, "context", ranks)
    for site, part in spec.parts():
        what = f"{site.name}: {part.slot[:-1]} {part.kind_name()}: context={ranks} is not supported"
        whole = {law: reason for law, reason in part.refusals().items() if law in ("chunking", "packing", "neighbours")}
        if whole:
            raise ValueError(f"{what}, since {next(iter(whole.values()))}; accepted: context=1")
    refuse_dropout(spec, "context", ranks)


def apply(model: LM, mesh: Mesh) -> None:
    """Spread the rows that the model is called with over the ranks of `context`. Its losses are then those of this
    rank's tokens, and what it returns as logits is of all."""
    refuse(model.spec, mesh.size("context"))
    assert isinstance(model.blank, Forgetting)
    plan = Context(Line.of(mesh, "context"), model.blank.fields, mesh.spec.ring)
    model.blank = plan
    model.register_forward_pre_hook(plan.enter, with_kwargs=True)
    model.register_forward_hook(plan.leave, with_kwargs=True)
