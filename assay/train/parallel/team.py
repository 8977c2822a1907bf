"""What an optimiser step asks of the other processes. A process alone asks nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from assay.data.loader import Batch
from assay.model.lm import LM
from assay.ops.step import RowsOf
from assay.spec.shard import Deal
from assay.train.evaluate import Evaluation
from assay.train.parallel import context, expert, pipeline, replicas, tensor
from assay.train.parallel.dealt import Layout, dealt
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.pipeline import Stage
from assay.train.parallel.plan import deal_of, joined, mine
from assay.train.parallel.spec import ROWS, TOKENS


class Team:
    """A model's place on a mesh: which rows, whose gradients, and how a weight's parts make the whole."""

    def __init__(self, model: LM, mesh: Mesh, precision: str) -> None:
        self.mesh, self.model = mesh, model
        self.deal = deal_of(model.spec, mesh) if mesh.size("tensor", "expert") > 1 else Deal()
        # Of a piece that several `tensor` ranks hold, each has the gradient of what it reads of it.
        counts = sorted({cut.copies for cut in self.deal.cuts.values()} - {1})
        self.copies = {count: mesh.block("tensor", count) for count in counts}
        self.stage = spread(model, mesh, precision)
        self.parameters = dict(model.named_parameters())

    @property
    def alone(self) -> bool:
        return self.mesh.processes == 1

    @property
    def cuts(self) -> bool:
        """Whether any process holds less than the whole model."""
        return self.casts or bool(self.deal.cuts) or self.stage is not None

    @property
    def casts(self) -> bool:
        """Whether weights are gathered in the precision of the products: nobody else has to cast them then."""
        return self.mesh.size("shard") > 1

    def part(self, batch: Batch, even: bool = False) -> tuple[Batch, RowsOf | None]:
        """This process's rows of a batch, as even as they can be dealt out; one without a row has one of padding.
        even: as many for all, some of them padding."""
        n, rows, group = self.mesh.size(*ROWS), batch.grid[0], self.mesh.group(*TOKENS)
        if group is None:
            return batch, None
        if n == 1:
            return batch, RowsOf(0, rows, rows, lambda x: self.mesh.comm.total(x, group))
        place, most = self.mesh.rank(*ROWS), -(-rows // n)
        first, stop = (most * place, most * place + most) if even else (rows * place // n, rows * (place + 1) // n)
        first, stop = min(first, rows), min(stop, rows)
        size = most if even else max(1, stop - first)
        found = padded(batch, first, stop, size)
        return found, RowsOf(first, size, rows, lambda x: self.mesh.comm.total(x, group))

    def run(self, pieces: int, objective: Callable[[int], Tensor]) -> None:
        """The gradients of a batch's pieces, objective(i) being what is minimised of number i."""
        if self.stage is not None:
            self.stage.run(pieces, objective)
            self.stage.settle(self.model)
            return
        for i in range(pieces):
            self.sync(i == pieces - 1)
            objective(i).backward()

    def sync(self, last: bool) -> None:
        """Before a backward pass: only that of a step's last piece exchanges gradients."""
        for unit in replicas.units(self.model) if self.casts else ():
            unit.set_requires_gradient_sync(last)

    def axes(self, name: str) -> tuple[str, ...]:
        """The axes along which the processes' gradients of this weight are parts of a sum."""
        cut = self.deal.cuts.get(name)
        done = {cut.axis} if cut is not None else set()
        done |= {"shard"} if self.casts and self.parameters[name].requires_grad else set()
        more = ("tensor",) if name in self.deal.partial else ()
        return tuple(axis for axis in (*TOKENS, *more) if axis not in done and self.mesh.size(axis) > 1)

    def share(self, counted: int, total: int) -> float:
        """Of a mean over all tokens of a step, what counts here: by targets, which ranks of `context` all see."""
        return (counted / total if counted != total else 1.0) / self.mesh.size("context")

    def reduce(self) -> None:
        """After the last backward pass: every gradient becomes the sum over all processes."""
        found: dict[tuple[str, ...], list[Tensor]] = {}
        for name, p in self.parameters.items():
            if p.grad is None and name in self.deal.partial and p.requires_grad:
                p.grad = torch.zeros_like(p)  # a bias that another rank adds
            if p.grad is not None:
                found.setdefault(self.axes(name), []).append(replicas.local(p.grad))
        for axes, grads in found.items():
            replicas.summed(grads, self.mesh.comm, self.mesh.group(*axes))
        for count, group in self.copies.items():
            alike = [name for name, cut in self.deal.cuts.items() if cut.copies == count and name in self.parameters]
            held = [self.parameters[name].grad for name in alike]
            replicas.summed([replicas.local(g) for g in held if g is not None], self.mesh.comm, group)

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        """Scale the gradient down to this norm; returns what it was. Of all weights, wherever their parts are: squares
        of what several processes hold count for each of them by its share."""
        grads = [(name, replicas.local(p.grad)) for name, p in self.parameters.items() if p.grad is not None]
        if self.alone:
            return torch.nn.utils.clip_grad_norm_(self.parameters.values(), most)
        total = torch.stack([g.square().sum() / self.holders(name) for name, g in grads]).sum()
        self.mesh.comm.all_reduce(total, self.mesh.everyone)
        norm = total.sqrt()
        torch._foreach_mul_([g for _, g in grads], (most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def holders(self, name: str) -> int:
        """How many processes hold the same values of this weight as this one."""
        cut = self.deal.cuts.get(name)
        apart = {"pipeline", *([cut.axis] if cut is not None else [])}
        apart |= {"shard"} if self.casts and self.parameters[name].requires_grad else set()
        same = 1 if self.stage is None else self.stage.holders(name)
        same *= 1 if cut is None else cut.copies
        return same * (self.mesh.processes // self.mesh.size(*apart))

    def total(self, values: Mapping[str, Tensor], axes: tuple[str, ...] = TOKENS) -> dict[str, Tensor]:
        """Sums over all tokens of the step, wherever they are."""
        group = self.mesh.group(*axes)
        if group is None or not values:
            return dict(values)
        flat = torch.cat([v.reshape(-1) for v in values.values()])
        self.mesh.comm.all_reduce(flat, group)
        parts = flat.split([v.numel() for v in values.values()])
        return {name: part.view_as(v) for (name, v), part in zip(values.items(), parts, strict=True)}

    def evaluation(self, part: Evaluation) -> Evaluation:
        """Of all processes' rows. ValueError when they hold no target."""
        if self.mesh.size(*ROWS) > 1:
            sums = {"nats": part.index_nats, "counts": part.index_tokens, "size": (part.tokens, part.bytes)}
            found = self.total({name: torch.tensor(v, dtype=torch.float64) for name, v in sums.items()}, ROWS)
            counts, (tokens, size) = ([int(n) for n in found[name].tolist()] for name in ("counts", "size"))
            part = Evaluation(tokens, size, tuple(found["nats"].tolist()), tuple(counts))
        if self.stage is not None:
            nats = self.total({"": torch.tensor(part.index_nats, dtype=torch.float64)}, ("pipeline",))[""]
            part = replace(part, index_nats=tuple(nats.tolist()))
        return part.checked()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of these are true for any process; the same answer for all."""
        if self.alone:
            return flags
        found = torch.tensor([int(f) for f in flags])
        self.mesh.comm.all_reduce(found, self.mesh.everyone, dist.ReduceOp.MAX)
        return tuple(bool(f) for f in found.tolist())

    def keeps(self, name: str) -> bool:
        """Whether this process has a part of the weight; a name that no process knows is left to `own_moment`."""
        return self.stage is None or name in self.parameters or name not in self.stage.elsewhere

    def own(self, name: str, whole: Tensor) -> Tensor:
        """What this process holds of a weight, or of a moment of it."""
        parameter = self.parameters[name]
        return replicas.like(mine(whole.to(parameter.device), self.deal.cuts.get(name), self.mesh), parameter)

    def own_moment(self, key: str, whole: Tensor) -> Tensor:
        """What this process holds of `<weight>/<key>` of an optimiser's state. One that has not the weight's number of
        dimensions, as a count of steps, is whole everywhere. ValueError for a weight that the model lacks."""
        name = key.rpartition("/")[0]
        if name not in self.parameters:
            raise ValueError(f"state of {name!r}, which is no weight of this model")
        return self.own(name, whole) if whole.dim() == self.parameters[name].dim() else whole

    def whole(self, name: str, held: Tensor) -> Tensor:
        """The whole weight or moment, from everybody's part; all processes have to ask."""
        return joined(replicas.gathered(held), self.deal.cuts.get(name), self.mesh)

    def assembled(self, name: str, held: Tensor, dims: int) -> Tensor:
        """All of what processes hold of a tensor that is cut as this weight is; of one with more dimensions than
        `dims`, only along the last `dims`. Within an optimiser's step: every process asks, and it is counted."""
        first, cut = held.dim() - dims, self.deal.cuts.get(name)
        if first <= 0:
            held = replicas.all_rows(held, self.parameters[name], self.mesh)
        return joined(held, cut if cut is not None and cut.dim >= first else None, self.mesh)

    def piece(self, name: str, whole: Tensor, dims: int) -> Tensor:
        """This process's part of what `assembled` returned."""
        first, cut = whole.dim() - dims, self.deal.cuts.get(name)
        own = mine(whole, cut if cut is not None and cut.dim >= first else None, self.mesh)
        return replicas.own_rows(own, self.parameters[name], self.mesh) if first <= 0 else own

    def dealt(self, held: Mapping[str, Tensor], work: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """`work` of each whole matrix by its weight's name, as this process holds it; held: its parts. Each matrix is
        worked on by one process. Within an optimiser's step: every process asks for the same ones."""
        layouts = {name: Layout.of(self.parameters[name], self.deal.cuts.get(name), self.mesh) for name in held}
        return dealt(held, layouts, work)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The whole weights on the host of the first process; elsewhere nothing. All processes have to ask."""
        return self.kept({name: (name, p) for name, p in self.parameters.items()})

    @torch.no_grad()
    def kept(self, held: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors on the host of the first process, one after another; elsewhere nothing. held: by key, the
        weight that a tensor belongs to, and this process's part of it; one of another rank than the weight is whole."""
        found = {}
        for key, (name, own) in held.items():
            whole = self.whole(name, own) if own.dim() == self.parameters[name].dim() else own
            if self.mesh.first or self.stage is not None:
                found[key] = whole.detach().cpu()
        found = found if self.stage is None else self.stage.collected(found)
        return found if self.mesh.first else {}


def spread(model: LM, mesh: Mesh, precision: str) -> Stage | None:
    """Apply the plan of each axis that has more than one process; this one's stage, of a pipeline. ValueError, by name,
    for what has no plan."""
    for axis, plan in (("tensor", tensor), ("expert", expert), ("context", context)):
        if mesh.size(axis) > 1:
            plan.apply(model, mesh)
    if mesh.size("pipeline") > 1:
        return pipeline.apply(model, mesh)
    if mesh.size("shard") > 1:
        replicas.apply(model, mesh, precision)
    return None


def padded(batch: Batch, first: int, stop: int, size: int) -> Batch:
    """Rows first .. stop-1, and padding up to `size` rows, which is no sequence and no target."""
    missing = size - (stop - first)
    if not missing:
        return batch.part(first, stop - first)
    start = max(0, min(stop, batch.grid[0]) - size)
    found, length = batch.part(start, size), batch.grid[1]
    real = torch.zeros(size, dtype=torch.bool)
    real[first - start : stop - start] = True
    real = real.repeat_interleave(length)
    return replace(
        found,
        targets=found.targets.where(real, -1),
        seq=found.seq.where(real, -1),
        target_bytes=found.target_bytes.where(real, 0),
    )
