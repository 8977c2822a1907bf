"""Steps that only decode, run again from tapes: Python is paid for once for many tokens.

A step is known by everything about it but the contents of its tensors: shapes, numbers on the host, which pools are
written. One that is met for the second time is recorded while it runs, on copies of its tensors; from then on its
contents are copied there and the tape is run. What cannot be recorded runs as it always did.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from assay.cache import Slot
from assay.cache.onward import Onward
from assay.model.lm import LM, Output
from assay.ops import native
from assay.ops.native.kernels import ROWS, Kernels
from assay.ops.state import State
from assay.ops.step import Step
from assay.ops.tape import Recorder, Tape, Unrecordable
from assay.parts.base import Part
from assay.spec.base import Spec

MOST, TAPES = 64, 4  # steps that are known at once, and those with a tape, whose buffers stay: the oldest is forgotten
MET = "it was met once"
PLAIN = frozenset({bool, int, float, str, bytes, frozenset, type(None), torch.dtype, torch.device})


@dataclass(frozen=True)
class Recorded:
    """A tape, the step and states that it was recorded with and their tensors, and where its answer is. weights: where
    the model's were."""

    tape: Tape
    step: Step
    states: Mapping[str, State]
    inputs: tuple[Tensor, ...]
    weights: list[int]
    logits: Tensor

    def play(self, clock: Clock | None) -> Output:
        if clock is None:
            self.tape.run()
        else:
            clock.add(self.tape.timed())
        return Output(self.logits.clone(), None, {})


class Course:
    """Sequences that get a token after another from one tape: their step and states are moved on where they stand, and
    of the parts' tables those are made anew that the tape reads."""

    def __init__(self, model: LM, recorded: Recorded, onward: Onward) -> None:
        self.model, self.recorded, self.onward = model, recorded, onward
        self.bare = recorded.step.with_(tables={})
        self.tables: list[tuple[Part, State | None, Hashable, list[tuple[int, Tensor]]]] = []
        known = set[object]()
        for part, number in model._planned:
            state = recorded.states.get(part.name)
            key = (number, getattr(state, "layout_key", None))
            if key not in known:
                known.add(key)
                self._add(part, state)

    def _add(self, part: Part, state: State | None) -> None:
        own, new, table = Told(), Told(), self.recorded.step.table(part)
        own.key(table)
        told, looked = new.key(part.prepare(self.bare, state)), self.recorded.tape.reads(own.tensors)
        if len(new.tensors) != len(own.tensors):
            raise Unrecordable(f"{part.name}: another table of the same step")
        if table is not None:
            self.tables.append((part, state, told, [(i, t) for i, t in enumerate(own.tensors) if looked[i]]))

    def next(self, ids: Sequence[int], clock: Clock | None) -> Output | None:
        """The model's answer to these tokens; None where the cache's `begin` must see to it."""
        if not self.onward.move(ids):
            return None
        for part, state, told, read in self.tables:
            new = Told()
            if new.key(part.prepare(self.bare, state)) != told:  # another step for the layers: no tape has it
                self.onward.left = []
                step = self.model.prepared(self.bare, self.recorded.states, {})
                return self.model.stacked(step, self.recorded.states, {})
            for i, own in read:
                own.copy_(new.tensors[i])
        return self.recorded.play(clock)


class Clock:
    """Seconds and calls by name, of so many steps."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.calls = 0, dict[str, float](), Counter[str]()

    def add(self, took: Sequence[tuple[str, float]]) -> None:
        self.steps += 1
        for name, seconds in took:
            self.calls[name] += 1
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Tapes:
    """The tapes of one model. `run` is the model's answer to a step with these states."""

    def __init__(self, model: LM) -> None:
        self.model = model
        # A walk through the tree takes long.
        self._held = [(m._parameters, k) for m in model.modules() for k, p in m._parameters.items() if p is not None]
        self.made: OrderedDict[Hashable, Recorded | str] = OrderedDict()  # or why there is none
        self.refused = Counter[str]()
        self.clock: Clock | None = None
        self._last: Recorded | None = None  # what answered the last step
        self._course: Course | None = None

    def again(self, slots: Sequence[Slot], ids: Sequence[int]) -> Output | None:
        """The answer to a token more for each of the sequences of the last step, the cache's tables included; None
        where these are others. ValueError where the cache has no room."""
        course = self._course
        if course is None or not course.onward.follows(slots) or not _alone() or native.kernels() is None:
            return None
        return course.next(ids, self.clock) if course.recorded.weights == self._weights() else None

    def follow(self, store: object, slots: Sequence[Slot]) -> None:
        """Remember whose step was run last, so that `again` can go on from it."""
        last, self._course = self._last, None
        onward = None if last is None else Onward.of(store, slots, last.step, last.states)
        if last is not None and onward is not None:
            with suppress(Unrecordable):
                self._course = Course(self.model, last, onward)

    def run(self, step: Step, states: Mapping[str, State]) -> Output:
        self._last, self._course = None, None
        compiled = native.kernels() if self._may(step) else None
        if compiled is None:
            return self.model(step, states)
        step = self.model.prepared(step, states, {})
        told = Told()
        try:
            key = told.key((step, states))
        except Unrecordable as error:
            self.refused[str(error)] += 1
            return self.model.stacked(step, states, {})
        found = self.made.get(key)
        if isinstance(found, Recorded) and found.weights == self._weights():
            self.made.move_to_end(key)
            for own, new in zip(found.inputs, told.tensors, strict=True):
                own.copy_(new)
            self._last = found
            return found.play(self.clock)
        if found is None:
            self._keep(key, MET)
        if found is None or (isinstance(found, str) and found != MET):
            return self.model.stacked(step, states, {})
        return self._recorded(key, step, states, compiled)

    @contextmanager
    def clocked(self) -> Iterator[Clock]:
        """What tapes run meanwhile, and how long it takes."""
        self.clock = Clock()
        try:
            yield self.clock
        finally:
            self.clock = None

    def _may(self, step: Step) -> bool:
        """Few tokens, each of another sequence, and nobody who looks on."""
        count = step.tokens
        plain = not (step.listen or step.pieces or step.encode is not None or step.memory is not None)
        few = step.longest == 1 and step.decodes == count == step.past.shape[0] <= ROWS and step.ids.is_cpu
        return plain and few and _alone()

    def _weights(self) -> list[int]:
        found = (held[name] for held, name in self._held)
        return [p.data_ptr() if type(p) is nn.Parameter else getattr(p, "codes", p).data_ptr() for p in found]

    def _keep(self, key: Hashable, value: Recorded | str) -> None:
        self.made[key] = value
        self.made.move_to_end(key)
        tapes = [known for known, one in self.made.items() if isinstance(one, Recorded)]
        for known in tapes[:-TAPES]:
            del self.made[known]
        while len(self.made) > MOST:
            self.made.popitem(last=False)

    def _recorded(self, key: Hashable, step: Step, states: Mapping[str, State], compiled: Kernels) -> Output:
        """The step's answer, and its tape from now on."""
        copies = Copies()
        own_step, own_states = copies.of((step, states))
        told, recorder = Told(), Recorder(compiled.library, compiled.table)
        told.key((own_step, own_states))
        with recorder:
            out = self.model.stacked(own_step, own_states, {})
        assert out.logits is not None
        try:
            tape, inputs = recorder.tape(), tuple(told.tensors)
            self._last = Recorded(tape, own_step, own_states, inputs, self._weights(), out.logits)
            self._keep(key, self._last)
        except Unrecordable as error:
            self.refused[str(error)] += 1
            self._keep(key, str(error))
        return Output(out.logits.clone(), None, {})


def _alone() -> bool:
    """In inference, without promises about bits, and nobody looks on."""
    watched = torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling()
    return torch.is_inference_mode_enabled() and not watched and not torch.are_deterministic_algorithms_enabled()


@cache
def parts(kind: Any) -> tuple[tuple[str, str | None], ...]:
    """The fields of a dataclass, and what a tape is told of each: `host` is not read by layers, `live` is written by
    them where it stands, None is told."""
    return tuple((f.name, f.metadata.get("tape")) for f in fields(kind))


class Told:
    """Everything about a value but the contents of its tensors, in one order; `tensors` in that order, each once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._parts: list[Hashable] = []
        self._known: dict[int, int] = {}

    def key(self, value: Any) -> Hashable:
        """Unrecordable where something of it is of a kind that cannot be told."""
        self._tell(value)
        return tuple(self._parts)

    def _tell(self, value: Any) -> None:
        kind: Any = type(value)
        if kind in PLAIN:
            self._parts.append(value)
            return
        known = self._known.get(id(value))
        if known is not None:
            self._parts.append(known)
            return
        self._known[id(value)] = len(self._known)
        if kind is Tensor or kind is nn.Parameter:
            self.tensors.append(value)
            self._parts += (value.shape, value.stride(), value.dtype)
        elif is_dataclass(value):
            self._parts.append(kind)
            for name, mode in parts(kind):
                if mode == "live":
                    self._parts += (t.data_ptr() for t in _live(getattr(value, name)))
                elif mode is None:
                    self._tell(getattr(value, name))
        elif isinstance(value, (tuple, list)):
            self._parts.append(len(value))
            for one in value:
                self._tell(one)
        elif isinstance(value, Mapping):
            self._parts.append(tuple(value))
            for one in value.values():
                self._tell(one)
        elif isinstance(value, Spec):
            self._parts.append(value)
        else:
            raise Unrecordable(f"a step with a {kind.__name__} in it")


class Copies:
    """A value with copies of its tensors, the same ones wherever one stands twice; what is `live` stays."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if type(value) in PLAIN or isinstance(value, Spec):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._copy(value)
        return self._made[id(value)]

    def _copy(self, value: Any) -> Any:
        kind: Any = type(value)
        if isinstance(value, Tensor):
            return value.clone()
        if is_dataclass(value):
            given = {name: getattr(value, name) for name, _ in parts(kind)}
            return kind(**{n: self.of(given[n]) if mode is None else given[n] for n, mode in parts(kind)})
        if isinstance(value, Mapping):
            return {name: self.of(one) for name, one in value.items()}
        copied = [self.of(one) for one in value]
        return kind(*copied) if hasattr(kind, "_fields") else kind(copied)


def _live(value: Mapping[str, Any]) -> list[Tensor]:
    found = []
    for one in value.values():
        found += [one] if isinstance(one, Tensor) else [getattr(one, name) for name, _ in parts(one.__class__)]
    return found
