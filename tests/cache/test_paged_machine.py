"""The paged cache against plain lists of tokens, over random histories of sequences that share their beginnings."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from assay.cache import Paged, PageSize, Slot, Swapped
from assay.engine.runner import right_padded
from assay.ops.step import View
from assay.spec.base import StateField

FIELDS = {
    "full": (StateField("k", "token", (2,)), StateField("v", "token", (1, 3), "float32")),
    "ring": (StateField("k", "token", (2,), keep=4),),
    "both": (StateField("k", "token", (), keep=6), StateField("s", "sequence", (2,), init=0.5)),
    "none": (),
}
SIZE = PageSize(rows=4, page=3, pages=14, chunk=5, saves=3, tails=4, snapshots=4)
KEYS = (b"", b"other")


@dataclass
class Known:
    """What the cache must know of a sequence."""

    key: bytes
    tokens: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=lambda: [0])


def worth(known: Known, length: int) -> float:
    """A number that says everything about the first `length` tokens: what a layer would store for the last of them.
    Below 2^24, so that float32 has it exactly."""
    return 0.5 if not length else float(zlib.crc32(bytes([*known.tokens[:length], *known.key])) >> 8)


class Pages(RuleBasedStateMachine):
    """Two token ids only, so that beginnings are often alike."""

    @initialize(recurrent=st.booleans())
    def start(self, recurrent: bool) -> None:
        both = FIELDS["both"] if recurrent else FIELDS["both"][:1]
        self.cache, self.recurrent = Paged({**FIELDS, "both": both}, SIZE, torch.float64), recurrent
        self.texts: dict[Slot, Known] = {}
        self.away: list[tuple[Swapped, Known]] = []
        self.published: dict[tuple[str, str, bytes], Tensor] = {}

    @rule(prompt=st.integers(4, 14).map(lambda n: [0] * n) | st.lists(st.integers(0, 1), max_size=14), data=st.data())
    def serve(self, prompt: list[int], data: st.DataObject) -> None:
        """A prompt, in chunks that end at borders; where all rows are taken, one sequence has to go."""
        if len(self.texts) == SIZE.rows:
            self.close(data.draw(st.sampled_from(list(self.texts))), data)
        key = data.draw(st.sampled_from([KEYS[0], KEYS[0], KEYS[1]]))
        slot = self.cache.open(prompt, key)
        start = self.cache.length(slot)
        assert start % SIZE.page == 0 and start <= max(0, len(prompt) - 1)
        self.texts[slot] = Known(key, prompt[:start], [start])
        for at in range(start, len(prompt), SIZE.page):
            if len(self.texts[slot].tokens) == at:
                self.append([slot], [prompt[at : at + SIZE.page]])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def one(self, data: st.DataObject) -> None:
        """Several steps of one sequence, as far as it goes."""
        slot = data.draw(st.sampled_from(list(self.texts)))
        for _ in range(data.draw(st.integers(1, 4))):
            self.append([slot], self.some(data, [slot]))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def several(self, data: st.DataObject) -> None:
        """Sometimes the forward fails, and they are closed."""
        slots = data.draw(st.permutations(list(self.texts)))[: data.draw(st.integers(1, len(self.texts)))]
        self.append(slots, self.some(data, slots), fails=data.draw(st.integers(0, 9)) == 9)

    def some(self, data: st.DataObject, slots: list[Slot]) -> list[list[int]]:
        """New tokens for each: zeros up to the end of its page, or any."""
        tokens = st.lists(st.integers(0, 1), min_size=1, max_size=SIZE.chunk)
        lengths = [len(self.texts[slot].tokens) for slot in slots]
        return [data.draw(st.just([0] * (SIZE.page - n % SIZE.page)) | tokens) for n in lengths]

    def append(self, slots: list[Slot], rows: list[list[int]], fails: bool = False) -> None:
        past = [len(self.texts[slot].tokens) for slot in slots]
        step = right_padded(rows, past, [99] * len(rows), torch.device("cpu"))
        if not self.cache.fits([(slot, len(row)) for slot, row in zip(slots, rows, strict=True)]):
            before = copy.deepcopy([g.__dict__ | {"blocks": g.blocks.__dict__} for g in self.cache.groups.values()])
            with pytest.raises(ValueError, match="pages more are needed"):
                self.cache.begin(slots, step)
            after = [g.__dict__ | {"blocks": g.blocks.__dict__} for g in self.cache.groups.values()]
            assert [_plain(a) for a in after] == [_plain(b) for b in before]
            return
        states = self.cache.begin(slots, step)
        if self.recurrent:
            old = states["both"].load("s", step).read()[:, 0]
            assert old.tolist() == [worth(self.texts[slot], p) for slot, p in zip(slots, past, strict=True)]
        for slot, row, length in zip(slots, rows, past, strict=True):
            known = self.texts[slot]
            known.tokens += row
            known.saved = [*known.saved, length + len(row)][-SIZE.saves :]
        flat = self.flat(slots, past, max(len(row) for row in rows))
        if self.recurrent:
            new = torch.tensor([worth(k, len(k.tokens)) for k in (self.texts[slot] for slot in slots)])
            states["both"].store(step, s=new.double()[:, None].expand(-1, 2))
        two, three = flat[:, None].expand(-1, 2), flat.view(-1, 1, 1).expand(-1, 1, 3)
        self.see(slots, rows, states["full"].append(step, k=two, v=three))
        self.see(slots, rows, states["ring"].append(step, k=two), keep=4)
        self.see(slots, rows, states["both"].append(step, k=flat), keep=6)
        if not fails:
            self.cache.settle(slots)
        for slot in slots if fails else ():
            self.cache.close(slot)
            del self.texts[slot]

    def flat(self, slots: Sequence[Slot], past: Sequence[int], width: int) -> Tensor:
        """What the step's tokens store, padding too."""
        out = torch.full((len(slots), width), float("nan"), dtype=torch.float64)
        for i, (slot, start) in enumerate(zip(slots, past, strict=True)):
            known = self.texts[slot]
            for place in range(start, len(known.tokens)):
                out[i, place - start] = worth(known, place + 1)
        return out.view(-1)

    def see(self, slots: list[Slot], rows: list[list[int]], view: View, keep: int | None = None) -> None:
        """The view shows what the step's first token sees, and all behind it, each where the layout says."""
        for name in view.fields:
            for i, slot in enumerate(slots):
                values = view.dense(name)[i].reshape(view.layout.seq.shape[1], -1)[:, 0]
                assert bool(values.isfinite().all())
                there = view.layout.seq[i] == i
                shown = dict(zip(view.layout.index[i][there].tolist(), values[there].tolist(), strict=True))
                assert torch.equal(view.layout.positions[i][there], view.layout.index[i][there])
                known = self.texts[slot]
                first = 0 if keep is None else max(0, len(known.tokens) - len(rows[i]) - keep + 1)
                assert set(range(first, len(known.tokens))) <= set(shown)
                assert all(value == worth(known, place + 1) for place, value in shown.items())

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def otherwise(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.texts)))
        data.draw(st.sampled_from([self.close, self.rewind, self.fork, self.swap_out]))(slot, data)

    def rewind(self, slot: Slot, data: st.DataObject) -> None:
        known = self.texts[slot]
        length = data.draw(st.sampled_from(known.saved) | st.integers(0, len(known.tokens)))
        length = min(length, len(known.tokens))
        reach = self.cache.reach(slot, length)
        assert reach <= length and (reach == 0 or reach in known.saved or not self.recurrent)
        if reach != length:
            with pytest.raises(ValueError, match=f"the nearest before it is {reach}"):
                self.cache.rewind(slot, length)
        if length in known.saved and len(known.tokens) - length <= SIZE.chunk:
            assert reach == length
        self.cache.rewind(slot, reach)
        del known.tokens[reach:]
        known.saved = [n for n in known.saved if n <= reach] or [0]

    def fork(self, slot: Slot, data: st.DataObject) -> None:
        if len(self.texts) < SIZE.rows:
            made = self.cache.fork(slot)
            self.texts[made] = copy.deepcopy(self.texts[slot])
            for one in data.draw(st.permutations([slot, made])):
                self.append([one], self.some(data, [one]))

    def close(self, slot: Slot, data: st.DataObject) -> None:
        self.cache.close(slot)
        del self.texts[slot]

    def swap_out(self, slot: Slot, data: st.DataObject) -> None:
        self.away.append((self.cache.swap_out(slot), self.texts.pop(slot)))

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.away) - 1))
        if not self.cache.holds(self.away[number][0]):
            with pytest.raises(ValueError, match="no room for a sequence"):
                self.cache.swap_in(self.away[number][0])
            return
        swapped, known = self.away.pop(number)
        self.texts[self.cache.swap_in(swapped)] = known

    @invariant()
    def sound(self) -> None:
        self.cache.check_integrity()
        assert {s: self.cache.length(s) for s in self.texts} == {s: len(k.tokens) for s, k in self.texts.items()}

    @invariant()
    def published_pages_never_change(self) -> None:
        for part, kind in self.cache.kinds.items():
            for name, page in self.cache.groups[kind].blocks.found.items() if kind is not None else ():
                for f, pool in self.cache.pools[part].items():
                    if f != "s":
                        first = self.published.setdefault((part, f, name), pool[page].clone())
                        assert torch.equal(first, pool[page])

    @invariant()
    def free_pages_are_zeros(self) -> None:
        for part, kind in self.cache.kinds.items():
            free = list(self.cache.groups[kind].blocks.free) if kind is not None else []
            assert all(not pool[free].any() for f, pool in self.cache.pools[part].items() if f != "s")

    @invariant()
    def reported(self) -> None:
        told = self.cache.report()
        for group in told["groups"]:
            assert group["used"] + group["free"] + group["cached"] == group["pages"]
        assert told["filled_bytes"] <= told["held_bytes"] <= told["reserved_bytes"]


def _plain(values: dict[str, object]) -> dict[str, object]:
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=20, stateful_step_count=30)
