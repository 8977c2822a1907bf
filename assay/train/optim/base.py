"""What optimisers written here share: one weight after another, on what this process holds of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from assay.spec.base import Weight
from assay.train.optim.adamw import adamw
from assay.train.optim.groups import Group
from assay.train.optim.specs import AdamWSpec, OptimizerSpec, is_hidden
from assay.train.parallel.replicas import local


class Whole(Protocol):
    """How a weight's parts make the whole, for updates that need all of a matrix (`parallel.team.Team`). Every process
    asks for the same weights in the same order."""

    def assembled(self, name: str, held: Tensor, dims: int) -> Tensor:
        """All of what processes hold of a tensor that is cut as this weight is; of one with more dimensions than
        `dims`, only along the last `dims`."""

    def piece(self, name: str, whole: Tensor, dims: int) -> Tensor:
        """This process's part of what `assembled` returned."""

    def dealt(self, held: Mapping[str, Tensor], work: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """`work` of each whole matrix by its weight's name, as this process holds it; held: its parts."""


class Alone:
    """A process that holds all of every weight."""

    def assembled(self, name: str, held: Tensor, dims: int) -> Tensor:
        return held

    def piece(self, name: str, whole: Tensor, dims: int) -> Tensor:
        return whole

    def dealt(self, held: Mapping[str, Tensor], work: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: work(t) for name, t in held.items()}


@dataclass(frozen=True)
class Given:
    """What an optimiser works on: groups of parameters, their declarations by name, and who has the rest of them."""

    groups: Sequence[Group]
    table: Mapping[str, Weight]
    team: Whole = field(default_factory=Alone)

    def split(self) -> tuple[list[Group], list[Group]]:
        """Hidden matrices, and the rest."""
        kept: tuple[list[Group], list[Group]] = [], []
        for group in self.groups:
            for hidden, found in zip((True, False), kept, strict=True):
                chosen = {n: p for n, p in group.parameters.items() if is_hidden(self.table[n]) == hidden}
                if chosen:
                    found.append(Group(group.decay, chosen))
        return kept


Moving = tuple[str, Tensor, Tensor, Mapping[str, Any]]
"""A weight's name, the parameter, its gradient here, and its group."""


class ByWeight(torch.optim.Optimizer):
    """Moves one weight after another; a subclass says how. State that is cut as the weight is has its number of
    dimensions; any other is whole everywhere and has another one.

    rest: groups that AdamW works on instead, within the same state and groups.
    """

    def __init__(self, spec: OptimizerSpec, own: Sequence[Group], team: Whole, rest: Sequence[Group] = ()) -> None:
        if not own:
            raise ValueError(f"recipe.optimizer.kind: {spec.kind}; no matrix is trained: accepted: adamw")
        super().__init__(
            [
                {
                    "params": list(g.parameters.values()),
                    "names": list(g.parameters),
                    "weight_decay": spec.weight_decay if g.decay else 0.0,
                }
                for g in own
            ],
            {"lr": spec.lr},
        )
        self.team, self.own = team, list(self.param_groups)
        self.rest: torch.optim.Optimizer | None = None
        if rest:
            shared = {name: getattr(spec, name) for name in ("lr", "weight_decay", "betas", "eps")}
            self.rest = adamw(AdamWSpec(**shared), rest)
            self.rest.state = self.state
            self.param_groups += self.rest.param_groups
            self.defaults["fused"] = self.rest.defaults["fused"]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.advance(
            [
                (name, p, local(p.grad), group)
                for group in self.own
                for name, p in zip(group["names"], group["params"], strict=True)
                if p.grad is not None
            ]
        )
        if self.rest is not None:
            self.rest.step()

    def advance(self, weights: Sequence[Moving]) -> None:
        """All that have a gradient."""
        for one in weights:
            self.move(*one)

    def move(self, name: str, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        """One weight, by its gradient here."""
        raise NotImplementedError

    def kept(self, p: Tensor, *names: str) -> list[Tensor]:
        """What this process has of these moments, which are as large as the weight and begin at 0."""
        state = self.state[p]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        return [local(state[name]) for name in names]

    def counted(self, p: Tensor) -> int:
        """The number of this step for this weight, from 1 on. Kept on the host, so that no device is waited for."""
        state = self.state[p]
        step = state.setdefault("count", torch.zeros((), dtype=torch.float32))
        step += 1
        return int(step)
