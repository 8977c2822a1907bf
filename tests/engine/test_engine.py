"""The engine under any traffic: every reply is what its request says alone, and nothing is left behind."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from assay.cache import PageSize, predict
from assay.cache.backing import Backing
from assay.cache.tiers import DiskTier, Tiers
from assay.engine.config import Attention, EngineConfig, cache_size
from assay.engine.engine import Engine
from assay.engine.request import Request, SamplingParams, Serving
from assay.engine.runner import Runner, Token
from assay.engine.storage import Storage, kv_formats
from assay.model.lm import LM, state_table
from tests.cache.models import model, tokens
from tests.engine.test_runner import TEXT, alone, logits

BACKENDS = ("auto", "auto", "matmul", "tiled", "sdpa")
LAYERS = (("full",), ("full", "window"), ("window", "linear"), ("first", "full", "linear"))


def asked(seed: int, length: int, new: int, shared: int = 0, **more: Any) -> Request:
    """A prompt whose first `shared` tokens all such prompts have."""
    ids = (*tokens(1, shared, 77)[0].tolist(), *tokens(1, length, seed)[0].tolist())
    sampling = SamplingParams(temperature=float(seed % 2), seed=seed)
    return Request(prompt=ids, max_new=new, sampling=sampling, **more)


@cache
def expected(layers: tuple[str, ...], case: tuple[int, ...]) -> list[int]:
    return alone(model(layers), asked(*case))


def told(said: list[Token]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for token in said:
        found[token.request, token.choice] += [token.id] if token.id is not None else []
    return found


def empty(engine: Engine) -> None:
    """Nothing runs, and every page and row is free or only remembered."""
    cache = engine.runner.cache
    cache.check_integrity()
    assert not engine.busy and not engine.runner.horizons and cache.used_bytes() == 0
    assert engine.stats()["running"] == engine.stats()["waiting"] == engine.stats()["pages_used"] == 0


CONFIGS = st.builds(
    EngineConfig,
    max_running=st.integers(1, 4),
    tokens=st.just(48),
    page=st.sampled_from([None, 1, 3, 4, 16]),
    budget=st.integers(4, 24),
    chunk=st.integers(4, 24),
    policy=st.sampled_from(["chunked", "eager", "prefill_first", "static"]),
    preempt=st.sampled_from(["recompute", "swap", "never"]),
    attention=st.builds(Attention, prefill=st.sampled_from(BACKENDS), decode=st.sampled_from(BACKENDS)),
    prefix=st.booleans(),
    border=st.just(1),
    snapshots=st.integers(0, 6),
)
TRAFFIC = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 14), st.integers(1, 9), st.sampled_from([0, 8, 17]), st.integers(0, 6)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("layers", LAYERS, ids="-".join)
@given(config=CONFIGS, traffic=TRAFFIC, press=st.booleans())
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_any_company_says_what_each_says_alone(
    layers: tuple[str, ...], config: EngineConfig, traffic: list[tuple[int, ...]], press: bool
) -> None:
    """Prompts that share beginnings come in any order, in chunks, in pages, with preemptions and swaps."""
    lm = model(layers)
    if config.page == 16 and not config.prefix:
        config = config.model_copy(update={"border": 4})
    engine = Engine(lm, TEXT, pressed(config, lm) if press else config)
    requests = [asked(*case) for *case, _ in traffic]
    waits = [wait for *_, wait in traffic]
    said: list[Token] = []
    numbers: dict[int, int] = {}
    for turn in itertools.count():
        for i, request in enumerate(requests):
            if waits[i] == turn:
                numbers[engine.submit(request)] = i
        said += engine.step() if engine.busy else []
        engine.runner.cache.check_integrity()
        if turn > max(waits) and not engine.busy:
            break
    replies = told(said)
    for number, i in numbers.items():
        assert replies[number, 0] == expected(layers, traffic[i][:4]), f"request {i}"
    empty(engine)


def pressed(config: EngineConfig, lm: LM) -> EngineConfig:
    """The same with memory for one sequence of the longest, so that sequences push each other out."""
    fields = state_table(lm.spec)
    size = cache_size(config, lm.spec, fields, torch.float64)
    if not isinstance(size, PageSize):
        return config
    alone = replace(size, pages=-(-48 // size.page))
    return config.model_copy(update={"memory": predict(fields, alone, "float64").reserved})


def test_choices_share_the_prompt_and_differ() -> None:
    lm = model(("full", "linear"))
    engine = Engine(lm, TEXT, EngineConfig(tokens=64, page=4, border=1))
    request = asked(1, 21, 8).model_copy(update={"n": 3})
    engine.submit(request)
    said: list[Token] = []
    while engine.busy:
        said += engine.step()
        assert engine.scheduler.begun == len({t.choice for t in said} - {t.choice for t in said if t.finish})
    replies = told(said)
    assert replies[0, 0] == alone(lm, request)
    assert len({tuple(reply) for reply in replies.values()}) == 3
    assert {t.reused for t in said if t.choice > 0} == {20}
    empty(engine)


def test_cancelled_and_late_requests_leave_nothing() -> None:
    now = itertools.count()
    lm = model(("full", "window"))
    engine = Engine(lm, TEXT, EngineConfig(max_running=2, tokens=48, page=4), clock=lambda: float(next(now)))
    first, second, third = (engine.submit(asked(i, 9, 20)) for i in range(3))
    late = engine.submit(asked(5, 9, 20, serving=Serving(deadline_s=9.0)))
    engine.step()
    engine.cancel(first)
    engine.runner.cache.check_integrity()
    assert engine.stats()["running"] == 1
    engine.cancel(first)
    said = []
    while engine.busy:
        said += engine.step()
    assert told(said)[second, 0] and told(said)[third, 0]
    assert [(t.id, t.finish) for t in said if t.request == late][-1] == (None, "deadline")
    empty(engine)


def test_tenants_do_not_share_and_tell_no_time() -> None:
    lm = model(("full",))
    engine = Engine(lm, TEXT, EngineConfig(tokens=64, page=4))
    reused = []
    for tenant in ("a", "b", "a"):
        engine.submit(asked(0, 30, 1, serving=Serving(tenant=tenant)))
        reused += [token.reused for token in engine.step()]
    assert reused == [0, 0, 28]


def test_a_failed_step_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a broken step had stored is never used again."""
    lm, request = model(("full", "linear")), asked(0, 30, 6)
    engine = Engine(lm, TEXT, EngineConfig(tokens=64, page=4, border=1, chunk=8, budget=8))
    number = engine.submit(request)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "output", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError):
            engine.step()
    engine.cancel(number)
    empty(engine)
    other = engine.submit(request)
    said: list[Token] = []
    while engine.busy:
        said += engine.step()
    assert told(said)[other, 0] == alone(lm, request)


def test_damaged_logits_end_one_reply_and_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(("full",))
    engine = Engine(lm, TEXT, EngineConfig(tokens=64))
    bad, good = engine.submit(asked(0, 5, 6)), engine.submit(asked(2, 5, 6))
    step, rounds = Runner.step, itertools.count()

    def broken(self: Runner, work: Any, kept: bool) -> torch.Tensor:
        logits = step(self, work, kept).clone()
        if next(rounds) == 2:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(Runner, "step", broken)
    said: list[Token] = []
    while engine.busy:
        said += engine.step()
    assert [t.finish for t in said if t.request == bad] == [None, None, "error"]
    assert [t.why for t in said if t.why] == ["the model returned logits that are not numbers: its weights are damaged"]
    assert told(said)[good, 0] == alone(lm, asked(2, 5, 6))
    empty(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": (1, 19)}, "prompt token 19; this model has ids 0 to 18"),
        ({"max_new": 60}, "5 tokens and 60 new ones are 65; this engine serves sequences of up to 64"),
        ({"source": (1,)}, "`source` is what an encoder reads"),
        ({"sampling": SamplingParams(logit_bias={99: 1.0})}, "logit_bias: token 99"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    engine = Engine(model(("full",)), TEXT, EngineConfig(tokens=64))
    with pytest.raises(ValueError, match=message):
        engine.submit(asked(0, 5, 6).model_copy(update=change))
    empty(engine)


@pytest.mark.parametrize("layers", [("full",), ("window", "linear")], ids="-".join)
def test_pages_outlive_the_engine_on_a_disk(layers: tuple[str, ...], tmp_path: Path) -> None:
    """Another engine, with a cache that has never seen the prompt, goes on from what the first one left."""
    lm, request = model(layers), asked(0, 30, 5)
    reused = []
    for _ in range(2):
        backing = Backing(Tiers([DiskTier(tmp_path / "pages", 1 << 24)]), "model")
        engine = Engine(lm, TEXT, EngineConfig(tokens=64, page=4, border=1), storage=Storage(backing=backing))
        number = engine.submit(request)
        said: list[Token] = []
        while engine.busy:
            said += engine.step()
        backing.tiers.close()
        assert told(said)[number, 0] == alone(lm, request)
        reused.append(said[-1].reused)
    assert reused == [0, 28]


def test_keys_and_values_in_fewer_bits() -> None:
    """Eight bits of older tokens: smaller, and the replies of a confident model stay."""
    lm, requests = model(("full", "linear")), [asked(2 * i, 30, 5) for i in range(3)]
    fields = state_table(lm.spec)
    held = {}
    for dtype in (None, "int8", "int4"):
        storage = Storage(None if dtype is None else kv_formats(dtype, fields))
        engine = Engine(lm, TEXT, EngineConfig(tokens=2048, page=16, max_running=2), storage=storage)
        for request in requests:
            engine.submit(request)
        said: list[Token] = []
        while engine.busy:
            said += engine.step()
            engine.runner.cache.check_integrity()
        held[dtype] = engine.runner.cache.reserved_bytes()
        assert all(len(reply) == 5 for reply in told(said).values())
        empty(engine)
    assert held["int4"] < held["int8"] < held[None]


def test_storage_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer of this model stores keys and values"):
        kv_formats("int8", state_table(model(("linear",)).spec))
    with pytest.raises(ValueError, match="kv dtype: 'int3'; accepted: bf16, int8, int4"):
        kv_formats("int3", state_table(model(("full",)).spec))
    storage = Storage(kv_formats("int8", state_table(model(("full",)).spec)))
    with pytest.raises(ValueError, match="rows are kept in the model's dtype"):
        Engine(model(("full",)), TEXT, EngineConfig(tokens=64, page=None), storage=storage)


def test_no_end_before_the_least_tokens_in_any_company() -> None:
    """Against single tokens, each the likeliest of a full pass of those that may come."""
    lm, least, new = model(("full", "window")), 5, 9
    prompts = [tokens(1, 6 + i, 40 + i)[0].tolist() for i in range(4)]

    def one(known: list[int], out: tuple[int, ...]) -> int:
        last = logits(lm, torch.tensor([known]))[0, -1]
        return int(last.index_fill(0, torch.tensor(out, dtype=torch.long), float("-inf")).argmax())

    engine = Engine(lm, TEXT, EngineConfig(max_running=3, tokens=48, page=4, chunk=5, border=1))
    replies: dict[int, list[int]] = {}
    for prompt in prompts:
        free = [one(prompt, ())]  # what it would say first ends it, so that it counts
        ends, said = (free[0], 3), list[int]()
        while len(said) < new and not (said and said[-1] in ends):
            said.append(one([*prompt, *said], ends if len(said) < least else ()))
        asks = SamplingParams(temperature=0.0)
        request = Request(
            prompt=tuple(prompt), max_new=new, min_new=least, sampling=asks, stop_tokens=frozenset((*ends, 99999))
        )
        replies[engine.submit(request)] = said
    found: dict[int, list[int]] = {number: [] for number in replies}
    while engine.busy:
        for token in engine.step():
            assert token.id is not None
            found[token.request].append(token.id)
    assert found == replies and all(len(said) >= least for said in found.values())
