"""Steps that only decode, run again from tapes: Python is paid for once for many tokens.

A step is known by everything about it but the contents of its tensors: shapes, numbers on the host, which pools are
written. One that is met for the second time is recorded while it runs, on copies of its tensors; from then on its
contents are copied there and the tape is run. What cannot be recorded runs as it always did. Whoever decodes next may
take the seats of sequences that a tape was recorded with, all or some of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn

from assay.cache import Slot
from assay.cache.onward import Onward
from assay.engine.course import Clock, Course, Recorded
from assay.model.lm import LM, Output
from assay.ops import native
from assay.ops.graph import captured
from assay.ops.native.kernels import ROWS
from assay.ops.state import State
from assay.ops.step import Step
from assay.ops.tape import Recorder, Tape, Unrecordable
from assay.ops.told import Copies, Looks, Told

MOST = 256  # steps that are known at once
TAPES, HELD = 4, 256 << 20
"""Tapes that are kept whatever they hold, and bytes of buffers up to which there may be more: as sequences come and go,
steps of other sizes come and come again. The oldest is forgotten."""
MET = "it was met once"
PATIENCE = 16
"""Steps of a number of sequences that run on a tape with many empty seats before they get one of their own: to record
one takes as long as some dozen steps lose on empty seats."""


class Tapes:
    """The tapes of one model. `run` is the model's answer to a step with these states."""

    def __init__(self, model: LM) -> None:
        self.model = model
        self._held = [m._parameters for m in model.modules() if m._parameters]  # a walk through the tree takes long
        self._known: list[Tensor | None] = []
        self._stored: list[Tensor] = []  # what holds their values
        self.made: OrderedDict[Hashable, Recorded | str] = OrderedDict()  # or why there is none
        self.refused = Counter[str]()
        self.clock: Clock | None = None
        self._last: Recorded | None = None  # what answered the last step
        self._course: Course | None = None
        self._courses: list[Course] = []  # of tapes that are kept
        self._loose = Counter[int]()  # steps of so many sequences that ran with many empty seats

    def again(self, slots: Sequence[Slot], ids: Sequence[int], horizons: Mapping[Slot, int]) -> Output | None:
        """The answer to a token more for each of these sequences, the cache's tables included: those of the last step,
        or others that find seats on a tape; None where there is none. ValueError where the cache has no room."""
        if not self._courses or not _alone() or native.kernels() is None:
            return None
        course, out = self._course, None
        if course is not None and course.follows(slots) and self._may_sit(course, len(slots)):
            out = course.next(ids, self.clock)
        if out is None and (course := self._seated(slots, horizons)) is not None:
            self._course, out = course, course.next(ids, self.clock)
        if course is not None and out is not None:
            self._loose[len(slots)] += not tight(course, len(slots))
        return out

    def follow(self, store: object, slots: Sequence[Slot]) -> None:
        """Remember whose step was run last, so that `again` can go on from it."""
        last, self._course = self._last, None
        if last is None or not isinstance(last.tape, Tape):
            return
        onward = Onward.of(store, slots, last.step, last.states)
        if onward is not None:
            with suppress(Unrecordable):
                self._course = Course(self.model, last, onward, self._stored)
                self._courses = [*(one for one in self._courses if one.recorded is not last), self._course]

    def _may_sit(self, course: Course, count: int) -> bool:
        """Whether so many sequences may sit there: with few seats empty, or not often yet."""
        return tight(course, count) or self._loose[count] < PATIENCE

    def _seated(self, slots: Sequence[Slot], horizons: Mapping[Slot, int]) -> Course | None:
        """A course with these sequences on its seats, with as few empty ones as may be."""
        weights, keys = self._weights(), {id(one): key for key, one in self.made.items()}
        self._courses = [one for one in self._courses if id(one.recorded) in keys]
        for course in sorted(self._courses, key=lambda one: one.onward.seats):
            fits = course.onward.seats >= len(slots) and self._may_sit(course, len(slots))
            if fits and course.recorded.weights == weights and course.seat(slots, horizons):
                self.made.move_to_end(keys[id(course.recorded)])
                return course
        return None

    def run(self, step: Step, states: Mapping[str, State]) -> Output:
        self._last, self._course = None, None
        if not self._may(step):
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
        return (self._captured if step.ids.is_cuda else self._recorded)(key, step, states)

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
        few = step.longest == 1 and step.decodes == count == step.past.shape[0] <= ROWS
        return plain and few and _alone() and (step.ids.is_cuda or (step.ids.is_cpu and native.kernels() is not None))

    def _weights(self) -> list[int]:
        found: list[Tensor | None] = list(chain.from_iterable(map(dict.values, self._held)))
        if len(found) != len(self._known) or not all(map(is_, found, self._known)):
            self._known = found
            self._stored = [p if type(p) is nn.Parameter else getattr(p, "codes", p) for p in found if p is not None]
        return list(map(Tensor.data_ptr, self._stored))

    def _keep(self, key: Hashable, value: Recorded | str) -> None:
        self.made[key] = value
        self.made.move_to_end(key)
        tapes = [(known, one.tape) for known, one in self.made.items() if isinstance(one, Recorded)]
        held = sum(tape.held for _, tape in tapes)
        for known, tape in tapes[:-TAPES]:
            if held <= HELD:
                break
            held -= tape.held
            del self.made[known]
        while len(self.made) > MOST:
            self.made.popitem(last=False)

    def _captured(self, key: Hashable, step: Step, states: Mapping[str, State]) -> Output:
        """The step's answer on a CUDA device, and its graph from now on. Its cache's tables are made by `begin` each
        step: nothing of it stands on the host to be moved on there."""
        own_step, own_states = Copies().of((step, states))
        told = Told()
        told.key((own_step, own_states))
        try:
            out, graph = captured(lambda: self.model.stacked(own_step, own_states, {}))
        except Unrecordable as error:
            self.refused[str(error)] += 1
            self._keep(key, str(error))
            return self.model.stacked(step, states, {})
        assert out.logits is not None
        made = Recorded(graph, own_step, own_states, tuple(told.tensors), self._weights(), out.logits)
        self._keep(key, made)
        return made.play(self.clock)

    def _recorded(self, key: Hashable, step: Step, states: Mapping[str, State]) -> Output:
        """The step's answer, and its tape from now on."""
        compiled = native.kernels()
        assert compiled is not None
        copies = Copies()
        own_step, own_states = copies.of((step, states))
        told, recorder, looks = Told(), Recorder(compiled.library, compiled.table), Looks()
        told.key((own_step, own_states))
        with recorder, looks:
            out = self.model.stacked(own_step, own_states, {})
        assert out.logits is not None
        try:
            looks.check()
            tape, inputs = recorder.tape(), tuple(told.tensors)
            self._last = Recorded(tape, own_step, own_states, inputs, self._weights(), out.logits)
            self._keep(key, self._last)
        except Unrecordable as error:
            self.refused[str(error)] += 1
            self._keep(key, str(error))
        return Output(out.logits.clone(), None, {})


def tight(course: Course, count: int) -> bool:
    """Whether so many sequences leave at most a quarter as many seats empty: those are computed for nothing."""
    return course.onward.seats <= count + count // 4


def _alone() -> bool:
    """In inference, without promises about bits, and nobody looks on."""
    watched = torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling()
    return torch.is_inference_mode_enabled() and not watched and not torch.are_deterministic_algorithms_enabled()
