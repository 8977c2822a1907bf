"""Sequences that decode together, a token after another, from one tape."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from assay.cache import Slot
from assay.cache.onward import Onward
from assay.model.lm import LM, Output
from assay.ops.graph import Replay
from assay.ops.state import State
from assay.ops.step import Step
from assay.ops.tape import Tape, Unrecordable
from assay.ops.told import Told
from assay.parts.base import Part

AHEAD = 16  # steps whose tables are made at once: a processor that has just read all weights is slow at all that is new


class Clock:
    """Seconds and calls by name, of so many steps. They are added up when they are asked for: a step's own time is
    looked at meanwhile."""

    def __init__(self) -> None:
        self.took: list[Sequence[tuple[str, float]]] = []

    @property
    def steps(self) -> int:
        return len(self.took)

    @property
    def calls(self) -> Counter[str]:
        return Counter(name for step in self.took for name, _ in step)

    @property
    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for name, seconds in chain.from_iterable(self.took):
            found[name] += seconds
        return dict(found)


@dataclass(frozen=True)
class Recorded:
    """A tape, the step and states that it was recorded with and their tensors, and where its answer is. weights: where
    the model's were."""

    tape: Replay
    step: Step
    states: Mapping[str, State]
    inputs: tuple[Tensor, ...]
    weights: list[int]
    logits: Tensor

    def play(self, clock: Clock | None) -> Output:
        """The answer, which the next run of the tape writes over."""
        if clock is None:
            self.tape.run()
        else:
            clock.took.append(self.tape.timed())
        return Output(self.logits, None, {})


class Looked(dict[str, Tensor]):
    """The step's inputs, and whether anybody has looked at them."""

    looked = False

    def __getitem__(self, name: str) -> Tensor:
        self.looked = True
        return super().__getitem__(name)


@dataclass(frozen=True)
class Table:
    """What a part prepares for a step, as the tape knows it. own: those of its tensors that the tape reads, by their
    number among all."""

    part: Part
    state: State | None
    key: Hashable
    own: tuple[tuple[int, np.ndarray], ...]

    def made(self, step: Step) -> list[np.ndarray] | None:
        """The contents of `own` for this step; None where the table is another one, for which there is no tape."""
        new = Told()
        if new.key(self.part.prepare(step, self.state)) != self.key:
            return None
        return [array(new.tensors[i]).copy() for i, _ in self.own]


class Course:
    """A step and its states are moved on where they stand, and of the parts' tables those are made anew that the tape
    reads: for some steps ahead, since they follow from places alone. Unrecordable where a part prepares something
    else for the same step.

    weights: what holds the model's. Each step looks whether one of them has moved, in turn; their memory is kept, so
    that nothing is read that was freed.
    """

    def __init__(self, model: LM, recorded: Recorded, onward: Onward, weights: Sequence[Tensor]) -> None:
        self.model, self.recorded, self.onward = model, recorded, onward
        self.weights = list(zip(weights, recorded.weights, [w.untyped_storage() for w in weights], strict=True))
        self.turn = 0
        self.inputs = Looked(recorded.step.inputs)
        self.bare = recorded.step.with_(tables={}, inputs=self.inputs)
        self.tables = list(self._tables())
        self.ahead = deque[list[list[np.ndarray]]]()

    def _tables(self) -> Iterator[Table]:
        known, tape = set[object](), self.recorded.tape
        assert isinstance(tape, Tape)
        for part, number in self.model._planned:
            state = self.recorded.states.get(part.name)
            key = (number, getattr(state, "layout_key", None))
            if key not in known and (table := self.recorded.step.table(part)) is not None:
                own, new = Told(), Told()
                own.key(table)
                told, looked = new.key(part.prepare(self.bare, state)), tape.reads(own.tensors)
                if len(new.tensors) != len(own.tensors):
                    raise Unrecordable(f"{part.name}: another table of the same step")
                read = ((i, array(t)) for i, t in enumerate(own.tensors) if looked[i])
                yield Table(part, state, told, tuple(read))
            known.add(key)

    def _made(self) -> list[list[np.ndarray]] | None:
        """The contents of all tables for the step as it stands."""
        found = [table.made(self.bare) for table in self.tables]
        kept = [one for one in found if one is not None]
        return kept if len(kept) == len(found) else None

    def _look(self) -> bool:
        """The contents of the tables for this step and some after it; False where the first is of another kind."""
        made = self._made()
        if made is None:
            return False
        self.ahead.append(made)
        if not self.inputs.looked:
            for _ in self.onward.foretold(AHEAD - 1):
                made = self._made()
                if made is None:
                    break
                self.ahead.append(made)
        return True

    def follows(self, slots: Sequence[Slot]) -> bool:
        """Whether these are its sequences, as they were left, and the weights seem to be where they were."""
        self.turn = (self.turn + 1) % len(self.weights)
        weight, place, _ = self.weights[self.turn]
        return self.onward.follows(slots) and weight.data_ptr() == place

    def seat(self, slots: Sequence[Slot], horizons: Mapping[Slot, int]) -> bool:
        """Go on with these sequences, up to as many as it was recorded with; False where it cannot be theirs."""
        if not self.onward.seat(slots, horizons):
            return False
        self.ahead.clear()
        return True

    def next(self, ids: Sequence[int], clock: Clock | None) -> Output | None:
        """The model's answer to these tokens; None where the cache's `begin` must see to it."""
        if not self.onward.move(ids):
            return None
        out = self._answer(clock)
        if len(ids) < self.onward.seats and out.logits is not None:
            out = Output(out.logits[: len(ids)], None, {})
        return out

    def _answer(self, clock: Clock | None) -> Output:
        """To the step as it stands, for all seats."""
        if not self.ahead and not self._look():
            self.onward.left = []
            step = self.model.prepared(self.recorded.step.with_(tables={}), self.recorded.states, {})
            return self.model.stacked(step, self.recorded.states, {})
        for table, made in zip(self.tables, self.ahead.popleft(), strict=True):
            for (_, own), new in zip(table.own, made, strict=True):
                own[...] = new
        return self.recorded.play(clock)


def array(t: Tensor) -> np.ndarray:
    """The same memory; numpy has no bfloat16, so that its bits stand for it."""
    found: np.ndarray = (t.view(torch.int16) if t.dtype is torch.bfloat16 else t).numpy()
    return found
