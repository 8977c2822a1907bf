"""The cache against a plain list of tokens a sequence, over random histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from assay.cache import Cache, Size, Slot
from assay.ops.step import View, rows_step
from assay.spec.base import StateField
from tests.cache.models import feed, logits, model, opened, tokens

FIELDS = {
    "full": (StateField("k", "token", (2,)), StateField("v", "token", (1, 3), "float32")),
    "ring": (StateField("k", "token", (2,), keep=4),),
    "both": (StateField("k", "token", (), keep=6), StateField("s", "sequence", (2,), init=0.5)),
    "none": (),
}
SIZE = Size(rows=3, tokens=30, chunk=5, saves=3)


class Store(RuleBasedStateMachine):
    """Every token is a number; the model of a sequence is the list of its numbers, and the sum is its recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(FIELDS, SIZE, torch.float64)
        self.texts: dict[Slot, list[int]] = {}
        self.saved: dict[Slot, list[int]] = {}
        self.next = 1

    @precondition(lambda self: len(self.texts) < SIZE.rows)
    @rule()
    def open(self) -> None:
        slot = self.cache.open()
        self.texts[slot], self.saved[slot] = [], [0]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(1, SIZE.chunk))
    def append(self, data: st.DataObject, count: int) -> None:
        """Some of the sequences, in some order, that all have the same length."""
        first = data.draw(st.sampled_from(list(self.texts)))
        same = [s for s in self.texts if len(self.texts[s]) == len(self.texts[first])]
        slots = data.draw(st.permutations(same))[: data.draw(st.integers(1, len(same)))]
        past = len(self.texts[first])
        count = min(count, SIZE.tokens - past)
        if not count:
            return
        new = torch.arange(self.next, self.next + len(slots) * count).view(len(slots), count)
        self.next += new.numel()
        step = rows_step(new, past)
        states = self.cache.begin(slots, step)
        old = states["both"].load("s", step).read()[:, 0]
        expected = torch.tensor([0.5 + sum(self.texts[slot]) for slot in slots], dtype=torch.float64)
        assert torch.equal(old, expected)
        for slot, row in zip(slots, new.tolist(), strict=True):
            self.texts[slot] += row
            self.saved[slot] = [*self.saved[slot], past + count][-SIZE.saves :]
        flat = new.view(-1).double()
        total = (old + new.sum(1)).double()
        states["both"].store(step, s=total[:, None].expand(-1, 2))
        self.see(
            slots, states["full"].append(step, k=flat[:, None].expand(-1, 2), v=flat.view(-1, 1, 1).expand(-1, 1, 3))
        )
        self.see(slots, states["ring"].append(step, k=flat[:, None].expand(-1, 2)), keep=4 + count - 1)
        self.see(slots, states["both"].append(step, k=flat), keep=6 + count - 1)

    def see(self, slots: list[Slot], view: View, keep: int | None = None) -> None:
        """The view shows at least the last `keep` tokens of each sequence, each where the layout says."""
        for name in view.fields:
            for i, slot in enumerate(slots):
                values = view.dense(name)[i].reshape(view.layout.seq.shape[1], -1)[:, 0]
                there = view.layout.seq[i] == i
                shown = dict(zip(view.layout.index[i][there].tolist(), values[there].tolist(), strict=True))
                text = self.texts[slot]
                assert all(text[place] == value for place, value in shown.items())
                assert set(range(0 if keep is None else max(0, len(text) - keep), len(text))) <= set(shown)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        length = data.draw(st.integers(0, len(self.texts[slot])))
        reach = self.cache.reach(slot, length)
        assert reach <= length and (reach == 0 or reach in self.saved[slot])
        if reach != length:
            with pytest.raises(ValueError, match=f"the nearest before it is {reach}"):
                self.cache.rewind(slot, length)
        self.cache.rewind(slot, reach)
        del self.texts[slot][reach:]
        self.saved[slot] = [n for n in self.saved[slot] if n <= reach] or [0]

    @precondition(lambda self: 0 < len(self.texts) < SIZE.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        made = self.cache.fork(slot)
        self.texts[made], self.saved[made] = list(self.texts[slot]), list(self.saved[slot])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        self.cache.close(slot)
        del self.texts[slot], self.saved[slot]

    @invariant()
    def sound(self) -> None:
        self.cache.check_integrity()
        assert {slot: self.cache.length(slot) for slot in self.texts} == {s: len(t) for s, t in self.texts.items()}
        width = 2 * 8 + 3 * 4
        used = sum(len(t) * width + min(len(t), 4) * 16 + min(len(t), 6) * 8 + 16 for t in self.texts.values())
        assert self.cache.used_bytes() == used


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=20, stateful_step_count=25)


def test_going_back_is_never_having_gone() -> None:
    lm, size = model(("full", "window", "linear")), Size(1, 20, 4, saves=20)
    ids, other = tokens(1, 12), tokens(1, 4, 9)
    store, slots = opened(lm, size)
    feed(lm, store, slots, ids[:, :4])
    feed(lm, store, slots, ids[:, 4:8])
    feed(lm, store, slots, other)
    store.rewind(slots[0], 8)
    after = feed(lm, store, slots, ids[:, 8:])
    fresh, others = opened(lm, size)
    for piece in ids[:, :8].split(4, 1):
        feed(lm, fresh, others, piece)
    assert torch.equal(after, feed(lm, fresh, others, ids[:, 8:]))


def test_a_ring_goes_back_only_as_far_as_its_window_is_whole() -> None:
    """chunk tokens are always there; the window of an earlier length has been overwritten."""
    lm, ids = model(("window",)), tokens(1, 16)
    store, slots = opened(lm, Size(1, 30, 3))
    for piece in ids.split([3, 3, 3, 3, 3, 1], 1):
        feed(lm, store, slots, piece)
    assert [n for n in range(17) if store.reach(slots[0], n) == n] == [0, 13, 14, 15, 16]
    with pytest.raises(ValueError, match="rewind to 12"):
        store.rewind(slots[0], 12)
    store.rewind(slots[0], 13)
    close = (feed(lm, store, slots, ids[:, 13:]) - logits(lm, ids)[:, 13:]).abs().max()
    assert float(close) < 1e-12


def test_a_fork_is_independent() -> None:
    lm = model(("full", "window", "linear"))
    store, (slot, spare) = opened(lm, Size(2, 20, 8, saves=2))
    store.close(spare)
    feed(lm, store, [slot], tokens(1, 8))
    twin = store.fork(slot)
    a, b = tokens(1, 5, 1), tokens(1, 5, 2)

    def alone(ids: Tensor) -> Tensor:
        fresh, others = opened(lm, Size(1, 20, 8, saves=2))
        feed(lm, fresh, others, tokens(1, 8))
        return feed(lm, fresh, others, ids)

    assert torch.allclose(feed(lm, store, [slot], a), alone(a), atol=1e-12)
    assert torch.allclose(feed(lm, store, [twin], b), alone(b), atol=1e-12)


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    lm, ids = model(("window",)), tokens(1, 13)
    store, slots = opened(lm, Size(2, 12, 4))
    one = rows_step(ids[:, :1])
    with pytest.raises(ValueError, match="5 new tokens; windows were allocated for 4"):
        feed(lm, store, slots[:1], ids[:, :5])
    with pytest.raises(ValueError, match="13 tokens; this cache holds 12"):
        feed(lm, store, slots[:1], ids)
    with pytest.raises(ValueError, match="continues after 3 tokens, but 0 are stored"):
        store.begin(slots[:1], rows_step(ids[:, :1], 3))
    with pytest.raises(ValueError, match="1 sequences, and 2 slots"):
        store.begin(slots, one)
    with pytest.raises(ValueError, match="twice"):
        store.begin([slots[0], slots[0]], one)
    with pytest.raises(ValueError, match="closed"):
        store.begin([Slot(0, 7)], one)
    with pytest.raises(ValueError, match="all 2 of this cache are open"):
        store.open()
    assert store.length(slots[0]) == 0
