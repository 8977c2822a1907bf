"""What a part may ask of memory. Caches implement it; `Stateless` is training: it returns what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from assay.ops.step import Layout, Step, View
from assay.spec.base import DTYPE_BYTES, StateField


@dataclass(frozen=True)
class Rows:
    """A sequence field: the pool it lives in and the row of each sequence, so that a kernel may read it where it
    stands. Nothing is written there but by `State.store`: two sequences of a step may have one row."""

    pool: Tensor
    index: Tensor

    def read(self) -> Tensor:
        """[B, ...] copies of the rows."""
        return self.pool.index_select(0, self.index)


class State(Protocol):
    """One part's memory during one step."""

    keeps: bool  # False: nothing outlives the step, so sequence fields need not be computed

    def layout(self, step: Step) -> Layout:
        """Where the entries of the view will stand once this step's tokens are appended."""

    def append(self, step: Step, **new: Tensor) -> View:
        """Add this step's entries of token (or memory) fields, [N, ...] each, and see what is visible."""

    def view(self, step: Step) -> View:
        """Memory fields stored by an earlier step."""

    def load(self, name: str, step: Step) -> Rows:
        """A sequence field as it was before this step."""

    def store(self, step: Step, **rows: Tensor) -> None:
        """Sequence fields after the tokens in `step.saves`, [M, ...] each."""


def dtype_of(field: StateField, model: torch.dtype) -> torch.dtype:
    if field.dtype == "model":
        return model
    if field.dtype not in DTYPE_BYTES:
        raise ValueError(f"state field {field.name}: dtype {field.dtype!r}; accepted: model, {', '.join(DTYPE_BYTES)}")
    return getattr(torch, field.dtype)


def step_layout(step: Step) -> Layout:
    """The layout of this step's own tokens: rows of the grid, or one row for all."""
    shape = step.grid or (1, step.tokens)
    return Layout(step.seq.view(shape), step.index.view(shape), step.positions.view(shape), step.grid is not None)


class Stateless:
    """Training: a view of this step's own tokens; sequence fields start from their initial value every time."""

    keeps = False

    def __init__(self, fields: tuple[StateField, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.fields = {f.name: f for f in fields}
        self.dtype, self.device = dtype, device
        self._memory = any(f.per == "memory" for f in fields)

    def layout(self, step: Step) -> Layout:
        memory = step.memory
        if not self._memory or memory is None:
            return step_layout(step)
        shape = memory.grid or (1, memory.seq.shape[0])
        aligned = memory.grid is not None and step.grid is not None and memory.grid[0] == step.grid[0]
        index = memory.index.view(shape)
        return Layout(memory.seq.view(shape), index, index, aligned)

    def append(self, step: Step, **new: Tensor) -> View:
        layout = self.layout(step)
        return View({k: v.view(*layout.seq.shape, *v.shape[1:]) for k, v in new.items()}, layout)

    def view(self, step: Step) -> View:
        raise ValueError("cross-attention needs step.memory: nothing was stored before this step")

    def load(self, name: str, step: Step) -> Rows:
        f, count = self.fields[name], step.past.shape[0]
        pool = torch.full((1, *f.shape), f.init, dtype=dtype_of(f, self.dtype), device=self.device)
        return Rows(pool, torch.zeros(count, dtype=torch.long, device=self.device))

    def store(self, step: Step, **rows: Tensor) -> None:
        return None
