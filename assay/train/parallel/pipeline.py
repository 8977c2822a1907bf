"""Pipeline parallelism: each rank has some of the layers, and micro-batches pass from rank to rank and back.

The schedules are those of `assay.train.parallel.schedule`. What crosses a border is the residual stream ([N, D], or as
the blocks' residuals carry it) forward and its gradient backward, sent without waiting, so that neighbours that send to
one another do not wait for ever.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from assay.cost.parallel import UNDER_WAY
from assay.model.lm import LM, Entry, weight_table
from assay.ops.step import Step
from assay.parts.base import Position
from assay.spec.model import ModelSpec
from assay.spec.shard import TABLE, spans, tied
from assay.train.parallel.exchange import Line
from assay.train.parallel.mesh import Mesh
from assay.train.parallel.plan import refuse_dropout, refuse_encoder
from assay.train.parallel.schedule import Kind, order
from assay.train.parallel.spec import ParallelSpec

NOTHING = ("nll", "count", "objective")


@dataclass(frozen=True)
class Held:
    """A micro-batch between its way forward and its way back."""

    entered: Tensor | None
    left: Tensor | None
    objective: Tensor


class Stage:
    """This rank's layers between two borders."""

    def __init__(self, model: LM, line: Line) -> None:
        self.line, self.d_model = line, model.spec.d_model
        self.first, self.leaves = line.rank == 0, line.rank < line.ranks - 1
        self._like: Callable[[], Tensor] = lambda: next(model.parameters())
        self._open: Callable[[Tensor], Tensor] = lambda x: model.blocks[model.span[0]].open(x)
        self._entered: Tensor | None = None
        self._left: Tensor | None = None
        self._under_way: dict[int, deque[tuple[dist.Work | None, Tensor]]] = {}
        self.most_held = 0
        self.elsewhere: frozenset[str] = frozenset()  # weights of other stages alone
        self._tied = tied(model.spec)

    def enter(self, step: Step, own: Entry) -> tuple[Tensor, dict[str, object]]:
        if self.first:
            return own(step)
        like = self._like()
        shape = self._open(torch.empty(step.tokens, self.d_model, dtype=like.dtype, device="meta")).shape
        h = self._receive(like.new_empty(shape), self.line.rank - 1)
        self._entered = h.requires_grad_(torch.is_grad_enabled())
        return self._entered, {}

    def leave(self, h: Tensor) -> dict[str, Tensor]:
        self._send(h.detach(), self.line.rank + 1)
        self._left = h
        return dict.fromkeys(NOTHING, h.new_zeros(()))

    def run(self, micro: int, objective: Callable[[int], Tensor], kind: Kind = "1f1b") -> None:
        """Gradients of `micro` micro-batches. objective(i) calls the model on number i and returns what is minimised;
        before the last stage that is what its layers add, or 0."""
        held: dict[int, Held] = {}
        for task in order(kind, self.line.rank, self.line.ranks, micro):
            if task.back:
                self._back(held.pop(task.micro))
            else:
                value = objective(task.micro)
                held[task.micro] = Held(self._entered, self._left, value)
                self._entered = self._left = None
                self.most_held = max(self.most_held, len(held))
        self.finish()

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for waiting in self._under_way.values():
            while waiting:
                _wait(waiting)

    def _back(self, held: Held) -> None:
        roots: list[Tensor] = [held.objective] if held.objective.requires_grad else []
        grads: list[Tensor | None] = [None] * len(roots)
        if held.left is not None:
            roots.append(held.left)
            room = torch.empty_like(held.left, memory_format=torch.contiguous_format)
            grads.append(self._receive(room, self.line.rank + 1))
        torch.autograd.backward(roots, grads)
        if held.entered is not None:
            assert held.entered.grad is not None
            self._send(held.entered.grad, self.line.rank - 1)

    def _send(self, x: Tensor, to: int) -> None:
        # The neighbour takes the oldest without anything that comes later, in both schedules, and where stages are
        # equally fast it has. Without this wait a stage would keep what it sent of all micro-batches.
        x, waiting = x.contiguous(), self._under_way.setdefault(to, deque())
        if len(waiting) == UNDER_WAY:
            _wait(waiting)
        waiting.append((self.line.comm.send(x, to, self.line.group, wait=False), x))

    def _receive(self, into: Tensor, source: int) -> Tensor:
        self.line.comm.receive(into, source, self.line.group)
        return into

    def holders(self, name: str) -> int:
        """How many stages have this weight."""
        return 2 if self._tied and name == TABLE else 1

    def collected(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the first stage, what all stages hold by name; elsewhere what this one holds. Tensors of the host."""
        if not self.first:
            told = json.dumps([[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in held.items()])
            header = torch.frombuffer(bytearray(told.encode()), dtype=torch.uint8)
            for x in (torch.tensor([len(header)]), header, *held.values()):
                self.line.comm.send(x, 0, self.line.group)
            return held
        for source in range(1, self.line.ranks):
            size = self._receive(torch.zeros(1, dtype=torch.long), source)
            header = self._receive(torch.zeros(int(size), dtype=torch.uint8), source)
            for name, dtype, shape in json.loads(bytes(header.tolist())):
                held[name] = self._receive(torch.empty(shape, dtype=getattr(torch, dtype)), source)
        return held

    @torch.no_grad()
    def settle(self, model: LM) -> None:
        """The gradients of a table that the first and the last stage have, summed on both."""
        if not self._tied or (self.leaves and not self.first):
            return
        weight = model.embed.table()
        other = self.line.ranks - 1 if self.first else 0
        assert weight.grad is not None
        self._send(weight.grad.clone(), other)
        weight.grad += self._receive(torch.empty_like(weight.grad), other)
        self.finish()


def _wait(waiting: deque[tuple[dist.Work | None, Tensor]]) -> None:
    """Until the oldest has left."""
    work, _ = waiting.popleft()
    if work is not None:
        work.wait()


def refuse(spec: ModelSpec, how: ParallelSpec) -> None:
    """ValueError, by name, for what reaches from one stage into another, and for axes that a pipeline is not laid
    beside."""
    ranks = how.pipeline
    if how.shard > 1 or how.sequence:
        name, accepted = ("shard", "1") if how.shard > 1 else ("sequence", "false")
        raise ValueError(f"recipe.parallel.{name}: is not supported beside pipeline={ranks}; accepted: {accepted}")
    refuse_encoder(spec, "pipeline", ranks)
    refuse_dropout(spec, "pipeline", ranks)
    for layer, source in enumerate(spec.sources):
        if source != layer:
            raise ValueError(f"blocks.{layer}: like blocks.{source}: pipeline={ranks} is not supported; accepted: 1")
    for site, part in spec.parts():
        what = f"{site.name}: {part.slot[:-1]} {part.kind_name()}: pipeline={ranks} is not supported"
        for name in ("takes", "gives"):
            if isinstance(getattr(part, name, None), str):
                raise ValueError(f"{what} with `{name}`, which reaches into other layers; accepted: pipeline=1")
        if "pipeline" in part.refusals():
            raise ValueError(f"{what}, since {part.refusals()['pipeline']}; accepted: pipeline=1")
        if part.slot == "positions" and part.weights(site) and not _embeds(spec, site.name):
            raise ValueError(f"{what}, since layers of several stages read its weights; accepted: pipeline=1")


def _embeds(spec: ModelSpec, name: str) -> bool:
    """Whether a position scheme adds to the embedding, which is a matter of the first stage."""
    part = spec.positions[name.removeprefix("positions.")].build(spec.root(name))
    return type(part).on_embed is not Position.on_embed


def apply(model: LM, mesh: Mesh) -> Stage:
    """Leave this rank its layers, in place; weights keep their names. The first stage has the embedding, the last the
    final norm and the head, and both a tied table. ValueError, by name, for what cannot be dealt out so."""
    refuse(model.spec, mesh.spec)
    stage = Stage(model, Line.of(mesh, "pipeline"))
    model.span = spans(model.spec.layers, mesh.size("pipeline"))[mesh.rank("pipeline")]
    for layer in range(model.spec.layers):
        if layer not in model.span:
            model.blocks[layer] = nn.Identity()  # type: ignore[index]
    if not stage.first:
        for name, scheme in model.positions.items():
            if _embeds(model.spec, f"positions.{name}"):
                _empty(scheme)
        if not tied(model.spec) or stage.leaves:
            _empty(model.embed)
        elif model.spec.embed.children(model.embed.site):
            _empty(model.embed.norm)
    if stage.leaves:
        model.final_norm = None
        assert model.head is not None
        _empty(model.head)
    stage.elsewhere = frozenset(weight_table(model.spec)) - dict(model.named_parameters()).keys()
    alive = {id(m) for m in model.modules()}
    model._planned = [(m, key) for m, key in model._planned if id(m) in alive]
    model._flat = [(m, key) for m, key in model._flat if id(m) in alive]
    model.border = stage
    return stage


def _empty(module: nn.Module) -> None:
    """Without its weights."""
    for child in module.modules():
        for name in list(child._parameters):
            child.register_parameter(name, None)
