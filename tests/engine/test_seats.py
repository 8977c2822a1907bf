"""Sequences that come and go on a tape's seats, against every step made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from assay.cache import PageSize, Slot
from assay.engine import tapes
from assay.engine.course import Recorded
from assay.model.lm import LM, build
from assay.spec.load import load_model
from tests.engine.test_course import WINDOW, Watched
from tests.engine.test_tapes import MIXERS, SMALL, texts

PAGES = PageSize(6, 8, 120, 40)
GATED = MIXERS["gated_deltanet"]["blocks.block.mixer"]
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "window": WINDOW,
    "mla": MIXERS["mla"],
    "moe": MIXERS["moe"],
    "recurrent": MIXERS["gated_deltanet"],
    "two states": MIXERS["mamba2"],
    "hybrid": {
        "blocks.other": {"mixer": GATED, "ffn": {"kind": "gated", "width": 48}},
        "pattern": ["block", "other"],
    },
    "by length": {"positions.rope.scaling": {"kind": "dynamic", "factor": 2.0, "original": 8}},
}


pytestmark = pytest.mark.usefixtures("compiled")

# What happens between two tokens of everybody: a sequence of so many tokens joins, one leaves, one is taken back.
Event = tuple[str, int]
EVENTS = st.one_of(
    st.tuples(st.just("join"), st.integers(1, 30)),
    st.tuples(st.just("leave"), st.integers(0, 5)),
    st.tuples(st.just("back"), st.integers(0, 5)),
    st.tuples(st.just("say"), st.integers(1, 20)),
)


class Talk:
    """Sequences of a runner, by what happens to them; the logits of all tokens that were said."""

    def __init__(self, model: LM, anew: bool = False, size: PageSize = PAGES) -> None:
        self.runner, self.slots, self.found = Watched(model, size, anew), list[Slot](), list[Tensor]()

    def does(self, event: Event, seed: int) -> None:
        what, number = event
        if what == "join" and len(self.slots) < PAGES.rows:
            slot = self.runner.open(60 + number)
            self.runner.feed([slot], texts(1, number, seed))
            self.slots.append(slot)
        elif what == "leave" and len(self.slots) > 1:
            self.runner.close(self.slots.pop(number % len(self.slots)))
        elif what == "back" and self.slots:
            slot = self.slots[number % len(self.slots)]
            self.runner.cache.rewind(slot, self.runner.cache.reach(slot, self.runner.cache.length(slot) - 1))
        elif what == "say" and self.slots:
            self.slots = [slot for slot in self.slots if self.runner.cache.length(slot) + number < 150]
            if self.slots:
                self.found.append(self.runner.say(self.slots, number, seed))


def talks(model: LM, events: Sequence[Event], name: str = "") -> tuple[Talk, Talk]:
    """One that goes on from its tapes, and one that begins every step anew."""
    size = replace(PAGES, saves=2) if name in ("two states", "hybrid") else PAGES
    both = Talk(model, size=size), Talk(model, True, size)
    for talk in both:
        for seed, event in enumerate(events):
            talk.does(event, seed)
    return both


def check(talk: Talk, anew: Talk) -> None:
    """Bit for bit; a sequence that leaves others alone leaves nothing of its own in the stores."""
    for found, expected in zip(talk.found, anew.found, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(talk.runner.cache.tensors(), anew.runner.cache.tensors(), strict=True):
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)


FULL: list[Event] = [*(("join", 5 + 7 * i) for i in range(6)), ("say", 4)]


@pytest.mark.parametrize("name", MODELS)
def test_whoever_comes_and_goes_has_the_bits_of_beginning_anew(name: str) -> None:
    model = build(load_model("llama-11m", SMALL | MODELS[name]))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(EVENTS, min_size=4, max_size=14))
    def holds(events: list[Event]) -> None:
        check(*talks(model, [*FULL, *events], name))

    holds()


@pytest.mark.parametrize("name", MODELS)
def test_fewer_sequences_sit_on_the_tape_of_more(name: str) -> None:
    """Of whom nobody is at a page's end: then no step is begun, whoever leaves."""
    model = build(load_model("llama-11m", SMALL | MODELS[name]))
    leaving: list[Event] = [("leave", 0), ("say", 2), ("leave", 2), ("say", 2), ("leave", 3), ("say", 2)]
    talk, anew = talks(model, [*FULL, *leaving], name)
    check(talk, anew)
    begun, plain = talk.runner.begun, anew.runner.begun
    assert plain - begun >= 6 + 1, (begun, plain)
    assert len([one for one in talk.runner.tapes.made.values() if isinstance(one, Recorded)]) == 1


def test_a_number_of_sequences_that_stays_gets_its_own_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "PATIENCE", 5)
    model = build(load_model("llama-11m", SMALL))
    leave: list[Event] = [("leave", 0)] * 4
    talk, _ = talks(model, [*FULL, *leave, ("say", 5)])
    seats = [course.onward.seats for course in talk.runner.tapes._courses]
    talk.does(("say", 3), 99)
    assert seats == [6] and [course.onward.seats for course in talk.runner.tapes._courses] == [6, 2]


def test_a_tape_whose_seats_are_taken_is_the_last_to_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "PATIENCE", 0)
    talk = Talk(build(load_model("llama-11m", SMALL)))
    leave: list[Event] = [("leave", 0)] * 4
    for seed, event in enumerate([*FULL, *leave, ("say", 3), *FULL[:3]]):
        talk.does(event, seed)
    made = talk.runner.tapes.made
    many, few = (key for key, one in made.items() if isinstance(one, Recorded))
    assert [course.onward.seats for course in talk.runner.tapes._courses] == [6, 2] and list(made)[-1] == few
    talk.does(("say", 1), 70)
    assert list(made)[-1] == many
    made.clear()
    talk.does(("leave", 0), 71)
    talk.does(("join", 9), 72)
    begun = talk.runner.begun
    talk.does(("say", 1), 73)
    assert talk.runner.begun == begun + 1, "a tape that was forgotten has answered"


def test_weights_that_moved_are_seen_by_whoever_takes_a_seat() -> None:
    model = build(load_model("llama-11m", SMALL))
    talk, anew = talks(model, FULL)
    for p in model.parameters():
        p.data = p.data * 1.1
    for one in (talk, anew):
        one.does(("leave", 1), 0)
        one.does(("say", 3), 50)
    check(talk, anew)


def test_the_last_free_page_is_enough_for_the_one_who_needs_it() -> None:
    runner = Watched(build(load_model("llama-11m", SMALL)), PageSize(4, 8, 12, 40))
    slots = [runner.open(90) for _ in range(3)]
    runner.feed(slots, texts(3, 4))
    runner.say(slots, 3, 1)
    for slot in slots[1:]:
        runner.close(slot)
    runner.feed([runner.open(90)], texts(1, 80))
    begun = runner.begun
    runner.say(slots[:1], 9, 2)
    assert runner.begun == begun
    with pytest.raises(ValueError, match="1 pages more are needed"):
        runner.say(slots[:1], 1, 3)
