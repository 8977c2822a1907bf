"""Decoding that goes on from its last step's tables and tape, against every step made anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from assay.cache import PageSize, Size, Slot
from assay.engine.runner import Runner
from assay.engine.tapes import Tapes
from assay.model.lm import LM, build
from assay.spec.load import load_model
from tests.engine.test_tapes import MIXERS, SMALL, texts

ROWS, PAGES = Size(4, 150, 40), PageSize(4, 8, 80, 40)
WINDOW = {"blocks.block.mixer.sees": {"window": 21}}


pytestmark = pytest.mark.usefixtures("compiled")


class Watched(Runner):
    """Counts the steps for which the cache made its tables."""

    def __init__(self, model: LM, size: Size | PageSize, anew: bool = False) -> None:
        super().__init__(model, size)
        self.begun, begin = 0, self.cache.begin
        if anew:
            self.tapes.follow = lambda store, slots: None  # type: ignore[method-assign]

        def counted(slots: Any, step: Any) -> Any:
            self.begun += 1
            return begin(slots, step)

        self.cache.begin = counted  # type: ignore[method-assign]

    def say(self, slots: list[Slot], count: int, seed: int) -> Tensor:
        """Logits [T, B, V] of so many drawn tokens for each."""
        rows = texts(count, len(slots), seed)
        found = []
        for row in rows:
            found.append(self.feed(slots, [[token] for token in row]))
            self.cache.check_integrity()
        return torch.stack(found)


def story(runner: Watched) -> list[Tensor]:
    """Sequences of other lengths decode, are joined, forked, taken back, swapped out and in, and leave."""
    prompts = [row[: 9 + 13 * i] for i, row in enumerate(texts(3, 40))]
    slots = [runner.open(140) for _ in prompts]
    runner.feed(slots, prompts)
    found = [runner.say(slots, 40, 1)]
    late = runner.open(140)
    runner.feed([late], texts(1, 25, 7))
    found.append(runner.say(slots, 5, 2))
    found.append(runner.say([*slots, late], 9, 3))
    if runner.cache.reach(slots[0], 45) == 45:
        runner.cache.rewind(slots[0], 45)
    found.append(runner.say([*slots, late], 6, 4))
    runner.close(late)
    twin = runner.cache.fork(slots[1])
    runner.horizons[twin] = 140
    found.append(runner.say([slots[1], twin], 9, 5))
    runner.close(twin)
    moved = runner.swap_out(slots[2])
    back = runner.swap_in(moved, 140)
    assert back is not None
    found.append(runner.say([slots[0], slots[1], back], 7, 6))
    return found


@pytest.mark.parametrize("size", [ROWS, PAGES], ids=["rows", "pages"])
@pytest.mark.parametrize("name", ["gqa", "capped", "window", "mla", "gated_deltanet", "alibi"])
def test_going_on_has_the_bits_of_beginning_anew(name: str, size: Size | PageSize) -> None:
    changes = WINDOW if name == "window" else MIXERS[name]
    model = build(load_model("llama-11m", SMALL | changes))
    runner, plain = Watched(model, size), Watched(model, size, anew=True)
    for found, expected in zip(story(runner), story(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(runner.cache.tensors(), plain.cache.tensors(), strict=True):
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)
    assert runner.begun < plain.begun * 0.6, (runner.begun, plain.begun)


def test_what_does_not_fit_is_refused_as_by_the_cache() -> None:
    model = build(load_model("llama-11m", SMALL))
    for size, reason in ((Size(1, 30, 20), "this cache holds 30"), (PageSize(1, 8, 4, 20), "pages more are needed")):
        runner = Watched(model, size)
        slot = runner.open(32)
        runner.feed([slot], texts(1, 20))
        with pytest.raises(ValueError, match=reason):
            runner.say([slot], 20, 1)
        runner.cache.check_integrity()
        assert runner.cache.length(slot) == 30 if isinstance(size, Size) else 32


def test_weights_that_moved_are_seen_in_the_middle_of_a_reply() -> None:
    model = build(load_model("llama-11m", SMALL))
    runner, anew = Watched(model, ROWS), Watched(model, ROWS, anew=True)
    slots = [(one, one.open(60)) for one in (runner, anew)]
    for one, slot in slots:
        one.feed([slot], texts(1, 9))
        one.say([slot], 5, 1)
    for p in model.parameters():
        p.data = p.data * 1.1
    found = [one.say([slot], 3, 2) for one, slot in slots]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class Looking(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_the_step_itself() -> None:
    runner = Watched(build(load_model("llama-11m", SMALL)), ROWS)
    slot = runner.open(60)
    runner.feed([slot], texts(1, 9))
    runner.say([slot], 5, 1)
    begun = runner.begun
    runner.say([slot], 2, 2)
    assert runner.begun == begun and isinstance(runner.tapes, Tapes)
    with Looking() as looked:
        runner.say([slot], 1, 3)
    assert runner.begun == begun + 1 and looked.calls
