"""Replies that begin in one engine and go on in another, against replies that stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.cache import Swapped
from assay.engine.config import EngineConfig
from assay.engine.engine import Engine
from assay.engine.handoff import layout, layouts, pack, unpack
from assay.engine.request import Grammar, Request, SamplingParams
from assay.engine.runner import Runner, Token
from assay.engine.scheduler import Plan, Scheduler
from assay.engine.storage import Storage, kv_formats
from assay.model.lm import state_table
from tests.engine.apart import PAGES, ROWS, TEXT, asked, lm_of
from tests.engine.test_engine import empty, pressed

KEY = b"k" * 32
MODELS = ("full", "window", "linear", "full-window-linear", "first-linear", "mla", "mamba2", "mla-mamba2-window")


def ends(engine: Engine) -> list[Token]:
    said: list[Token] = []
    while engine.busy:
        said += engine.step()
    return said


def begun(engine: Engine, request: Request) -> tuple[int, list[Token]]:
    """Stepped until the first choice has said a token."""
    number, said = engine.submit(request), list[Token]()
    while not said:
        said += engine.step()
    return number, said


def moved(source: Engine, target: Engine, number: int, choice: int = 0) -> int:
    """Through bytes."""
    return target.adopt(unpack(pack(source.hand_over(number, choice), KEY), KEY))


def words(said: list[Token]) -> list[Any]:
    return [(t.id, t.text, t.finish, t.logprob, t.top) for t in said]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every step."""
    logits: list[Tensor] = []
    step = Runner.step

    def told(self: Runner, work: Any, kept: bool = True) -> Tensor:
        logits.append(step(self, work))
        return logits[-1]

    monkeypatch.setattr(Runner, "step", told)
    return logits


@pytest.mark.parametrize(
    ("kind", "dtype", "config"),
    [
        *((kind, torch.float32, PAGES) for kind in MODELS),
        *((kind, torch.float64, ROWS) for kind in ("full-window-linear", "mla-mamba2-window")),
    ],
)
def test_it_goes_on_with_the_same_bits(
    kind: str, dtype: torch.dtype, config: EngineConfig, heard: list[Tensor]
) -> None:
    lm, request = lm_of(kind, dtype), asked(logprobs=2)
    stays, reads, writes = (Engine(lm, TEXT, config) for _ in range(3))
    _, expected = begun(stays, request)
    expected += ends(stays)
    alone = list(heard)
    heard.clear()
    number, said = begun(reads, request)
    adopted = moved(reads, writes, number)
    empty_rows(reads)
    said += ends(writes)
    assert {t.request for t in said[1:]} == {adopted}
    assert words(said) == words(expected)
    assert all(torch.equal(a, b) for a, b in zip(alone, heard, strict=True))
    empty_rows(writes)


@pytest.mark.parametrize("bits", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("kind", ["full-linear", "mla"])
def test_keys_in_fewer_bits_go_on_with_the_same_bits(kind: str, bits: str, heard: list[Tensor]) -> None:
    """Some pages are codes by then and some are not; another format does not take them."""
    lm, request = lm_of(kind, torch.float32), asked(40, 12, logprobs=2)
    stored = Storage(replace(kv_formats(bits, state_table(lm.spec)), residual=8))
    stays, reads, writes = (Engine(lm, TEXT, PAGES, storage=stored) for _ in range(3))
    _, expected = begun(stays, request)
    expected += ends(stays)
    alone = list(heard)
    heard.clear()
    number, said = begun(reads, request)
    handed = reads.hand_over(number)
    with pytest.raises(ValueError, match="the reply comes from a cache with layout"):
        Engine(lm, TEXT, PAGES).adopt(handed)
    writes.adopt(unpack(pack(handed, KEY), KEY))
    said += ends(writes)
    assert words(said) == words(expected)
    assert all(torch.equal(a, b) for a, b in zip(alone, heard, strict=True))
    for engine in (reads, writes):
        empty_rows(engine)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["full-linear", "mla", "full-window"])
def test_who_goes_on_may_keep_fewer_bits(kind: str, bits: str, heard: list[Tensor]) -> None:
    """The bits of one engine with such keys that reads the prompt at once: a step sees its own tokens whole."""
    lm, request = lm_of(kind, torch.float32), asked(40, 12, logprobs=2)
    stored = Storage(replace(kv_formats(bits, state_table(lm.spec)), residual=4))
    stays, writes = (Engine(lm, TEXT, PAGES, storage=stored) for _ in range(2))
    reads = Engine(lm, TEXT, PAGES)
    _, expected = begun(stays, request)
    expected += ends(stays)
    alone = list(heard)
    heard.clear()
    number, said = begun(reads, request)
    handed = reads.hand_over(number)
    assert layout(reads.runner.cache) in layouts(writes.runner.cache)
    writes.adopt(unpack(pack(handed, KEY), KEY))
    said += writes.step()
    assert writes.runner.cache.report()["quantised_pages"]
    said += ends(writes)
    assert words(said) == words(expected)
    assert all(torch.equal(a, b) for a, b in zip(alone, heard, strict=True))
    empty_rows(writes)


def empty_rows(engine: Engine) -> None:
    engine.runner.cache.check_integrity()
    assert not engine.busy and not engine.runner.horizons and engine.runner.cache.used_bytes() == 0


def same(a: Swapped, b: Swapped) -> bool:
    tensors = all(torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)
    tables = all(
        book.base == b.tables[kind].base and torch.equal(book.positions, b.tables[kind].positions)
        for kind, book in a.tables.items()
    )
    keys = (a.tensors.keys(), a.tables.keys()) == (b.tensors.keys(), b.tables.keys())
    return tensors and tables and keys and (a.length, a.saved, a.text) == (b.length, b.saved, b.text)


@pytest.mark.parametrize("kind", ["full-window-linear", "mla"])
def test_what_is_stored_after_more_steps_is_the_same(kind: str) -> None:
    """Twice handed over, against once at the end."""
    lm, request = lm_of(kind), asked(new=12)
    stays, reads, writes = (Engine(lm, TEXT, PAGES) for _ in range(3))
    home, _ = begun(stays, request)
    number, _ = begun(reads, request)
    adopted = moved(reads, writes, number)
    for _ in range(7):
        stays.step()
        writes.step()
    there, here = writes.hand_over(adopted), stays.hand_over(home)
    assert there.said == here.said and len(here.said) == 8
    assert same(there.swapped, here.swapped)
    through = unpack(pack(here, KEY), KEY)
    assert same(through.swapped, here.swapped)
    assert replace(through, swapped=here.swapped) == here


def test_choices_grammars_and_stops_go_on() -> None:
    """Each choice goes by itself, with the state of its grammar, and a stop text that has begun is kept back."""
    lm = lm_of("full-linear")
    grammar = Grammar(choice=("\x01\x02\x03\x04", "\x01\x02\x05\x06\x07", "\x08\x01\x02\x03"))
    for request in (asked(n=3), asked(grammar=grammar), asked(stop=("\x0e\x0b", "\x01"))):
        stays, reads, writes = (Engine(lm, TEXT, PAGES) for _ in range(3))
        stays.submit(request)
        expected, said = ends(stays), list[Token]()
        number = reads.submit(request)
        while reads.busy:
            fresh = reads.step()
            said += fresh
            for token in fresh:
                if token.finish is None:
                    moved(reads, writes, number, token.choice)
        said += ends(writes)
        for choice in range(request.n):
            mine, its = ([t for t in some if t.choice == choice] for some in (said, expected))
            assert words(mine) == words(its)
            assert {t.reused for t in mine} == {t.reused for t in its}
        assert len({tuple(t.id for t in said if t.choice == c) for c in range(request.n)}) == request.n
        empty(reads)
        empty(writes)


@pytest.mark.parametrize("lacking", ["rows", "pages"])
def test_where_there_is_no_room_it_waits_and_is_not_read_again(lacking: str) -> None:
    """Three replies where one can run: each goes on from what was handed over, never from its prompt."""
    lm = lm_of("full-linear")
    few = PAGES.model_copy(update={"max_running": 1})
    config = few if lacking == "rows" else pressed(PAGES.model_copy(update={"tokens": 48}), lm)
    reads, writes = Engine(lm, TEXT, PAGES), Engine(lm, TEXT, config)
    requests = [asked(20 + i, 6, i, sampling=SamplingParams(seed=i)) for i in range(3)]
    said: dict[int, list[Token]] = {}
    for request in requests:
        number, first = begun(reads, request)
        said[moved(reads, writes, number)] = first
    steps = 0
    while writes.busy:
        steps += 1
        for token in writes.step():
            said[token.request].append(token)
        writes.runner.cache.check_integrity()
    for request, found in zip(requests, said.values(), strict=True):
        alone = Engine(lm, TEXT, PAGES)
        alone.submit(request)
        assert words(found) == words(ends(alone))
    assert steps == 3 * 5
    empty(writes)


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_preempted_after_its_hand_over_it_says_the_same(preempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replies of 35 tokens in an engine with memory for one of 48."""
    lm, requests = lm_of("full-window-linear"), [asked(5 + i, 30 - i) for i in range(2)]
    config = pressed(PAGES.model_copy(update={"tokens": 48, "preempt": preempt}), lm)
    reads, writes = Engine(lm, TEXT, PAGES), Engine(lm, TEXT, config)
    plans: list[Plan] = []
    plan = Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda *a: plans.append(plan(*a)) or plans[-1])
    said: dict[int, list[Token]] = {}
    for request in requests:
        number, first = begun(reads, request)
        said[moved(reads, writes, number)] = first
    for token in ends(writes):
        said[token.request].append(token)
    assert any(one.preempted for one in plans)
    for request, found in zip(requests, said.values(), strict=True):
        alone = Engine(lm, TEXT, PAGES)
        alone.submit(request)
        assert words(found) == words(ends(alone))
    empty(writes)


def test_cancelled_before_it_goes_on() -> None:
    lm = lm_of("full-linear")
    reads, writes = Engine(lm, TEXT, PAGES), Engine(lm, TEXT, PAGES)
    number, _ = begun(reads, asked())
    writes.cancel(moved(reads, writes, number))
    assert writes.step() == []
    empty(writes)


def test_what_cannot_go_on_is_refused() -> None:
    lm = lm_of("full-linear")
    reads = Engine(lm, TEXT, PAGES)
    with pytest.raises(ValueError, match="has said nothing"):
        reads.hand_over(reads.submit(asked()))
    reads.cancel(0)
    number, _ = begun(reads, asked())
    handed = reads.hand_over(number)
    with pytest.raises(ValueError, match="does not run"):
        reads.hand_over(number)
    for other in (Engine(lm_of("full-linear", torch.float32), TEXT, PAGES), Engine(lm, TEXT, ROWS)):
        with pytest.raises(ValueError, match="layout"):
            other.adopt(handed)
        assert not other.busy
    with pytest.raises(ValueError, match="sequences of up to 8"):
        Engine(lm, TEXT, PAGES.model_copy(update={"tokens": 8})).adopt(handed)


def test_bytes_that_changed_or_come_from_elsewhere_are_refused() -> None:
    reads = Engine(lm_of("full-linear"), TEXT, PAGES)
    number, _ = begun(reads, asked())
    blob = pack(reads.hand_over(number), KEY)
    changed = bytearray(blob)
    changed[len(blob) // 2] ^= 1
    for bad in (bytes(changed), blob[:-1], b"", blob[:40]):
        with pytest.raises(ValueError, match="damaged, or comes from elsewhere"):
            unpack(bad, KEY)
    with pytest.raises(ValueError, match="damaged, or comes from elsewhere"):
        unpack(blob, b"another" * 4)
