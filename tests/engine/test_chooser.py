"""The chooser against the sampler row by row, against transformers and torch, and against its neighbours."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from assay.engine.chooser import Chooser, Unchoosable, _constrain
from assay.engine.request import Request, SamplingParams
from assay.engine.sampler import Settings, probabilities, sample, uniform
from tests.engine.test_text import tokenizer

VOCAB = 50
TEXT = tokenizer()


def chooser() -> Chooser:
    return Chooser(VOCAB, TEXT, "cpu")


def logits(rows: int, seed: int) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def request(**given: object) -> Request:
    prompt = given.pop("prompt", (1, 2, 3))
    own = {key: given.pop(key) for key in list(given) if key in Request.model_fields}
    return Request(prompt=prompt, sampling=SamplingParams(**given), **own)  # type: ignore[arg-type]


REQUESTS = st.builds(
    request,
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9).map(tuple),
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 2.0]), max_size=3),
    seed=st.integers(0, 5),
    logprobs=st.sampled_from([None, 0, 3]),
)


def by_hand(asked: Request, said: list[int], row: Tensor) -> int:
    """One row in float32, with transformers' processors and a dense count of every token."""
    params, row = asked.sampling, row[None].clone()
    seen = torch.tensor([[*asked.prompt, *said]])
    if params.logit_bias:
        row = SequenceBiasLogitsProcessor([[[t], b] for t, b in params.logit_bias])(seen, row)
    if params.repetition_penalty != 1.0:
        row = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, row)
    for token, count in Counter(said).items():
        row[0, token] -= params.presence_penalty + params.frequency_penalty * count
    u = torch.tensor([uniform(params.seed or 0, len(said))], dtype=torch.float64)
    return int(sample(row, Settings.of([params]), u))


@given(asked=st.lists(REQUESTS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_logits_of_half_precision_are_chosen_from_as_if_they_were_wide(asked: list[Request], seed: int) -> None:
    narrow, wide = chooser(), chooser()
    for i, each in enumerate(asked):
        narrow.enter(i, each)
        wide.enter(i, each)
    for step in range(3):
        given = logits(len(asked), seed + 7 * step).bfloat16()
        assert narrow.choose(range(len(asked)), given) == wide.choose(range(len(asked)), given.float())


@given(asked=st.lists(REQUESTS, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rows_are_chosen_as_if_alone_and_as_transformers_would(asked: list[Request], seed: int) -> None:
    together, said = chooser(), [list[int]() for _ in asked]
    for i, each in enumerate(asked):
        together.enter(i, each)
    for step in range(4):
        made = logits(len(asked), 10 * seed + step)
        keys = list(range(len(asked)))[:: -1 if step % 2 else 1]
        for key, chosen in zip(keys, together.choose(keys, made[keys])):
            assert chosen.token == by_hand(asked[key], said[key], made[key])
            said[key].append(chosen.token)


def test_logprobs_are_the_models_own() -> None:
    """Whatever bias, penalties and temperature do to the draw."""
    made, some = logits(3, 4), chooser()
    some.enter("a", request(temperature=0.0, logprobs=3, logit_bias={7: 50.0}))
    some.enter("b", request(temperature=0.5, seed=1, logprobs=0, repetition_penalty=2.0))
    some.enter("c", request(temperature=0.0))
    a, b, c = some.choose(["a", "b", "c"], made)
    expected = torch.log(made.double().exp() / made.double().exp().sum(-1, keepdim=True))
    assert a.token == 7 and a.logprob == pytest.approx(float(expected[0, 7]), abs=1e-5)
    best = expected[0].sort(descending=True)
    assert [t for t, _ in a.top] == best.indices[:3].tolist()
    assert [p for _, p in a.top] == pytest.approx(best.values[:3].tolist(), abs=1e-5)
    assert b.top == () and b.logprob == pytest.approx(float(expected[1, b.token]), abs=1e-5)
    assert (c.logprob, c.top) == (None, ())


def replies(some: Chooser, keys: list[str], count: int) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {key: [] for key in keys}
    for step in range(count):
        for key, chosen in zip(keys, some.choose(keys, logits(1, step).expand(len(keys), -1))):
            said[key].append(chosen.token)
    return said


def test_choices_draw_by_themselves_and_the_first_is_the_plain_reply() -> None:
    some = chooser()
    for choice, key in enumerate("abcd"):
        some.enter(key, request(seed=9), choice)
    some.enter("again", request(seed=9), 2)
    said = replies(some, ["a", "b", "c", "d", "again"], 12)
    assert len({tuple(said[key]) for key in "abcd"}) == 4
    assert said["again"] == said["c"]
    keyed = [uniform(9, n, choice) for choice in range(16) for n in range(64)]
    assert len(set(keyed)) == len(keyed) and uniform(9, 5, 0) == uniform(9, 5)
    alone = [by_hand(request(seed=9), said["a"][:n], logits(1, n)[0]) for n in range(12)]
    assert said["a"] == alone


def test_a_fork_shares_the_past_and_nothing_after() -> None:
    asked = request(temperature=0.0, frequency_penalty=2.0, prompt=(5,))
    some, whole = chooser(), chooser()
    some.enter("a", asked)
    whole.enter("a", asked)
    first = replies(some, ["a"], 6)["a"]
    some.fork("a", "b", 1)
    assert replies(whole, ["a"], 6)["a"] == first
    after = replies(some, ["b"], 6)["b"]
    assert after != first
    assert replies(some, ["a"], 6)["a"] == after == replies(whole, ["a"], 6)["a"]
    some.leave("a")
    assert replies(some, ["b"], 1)["b"]
    with pytest.raises(KeyError):
        replies(some, ["a"], 1)


def test_unseeded_choices_differ() -> None:
    some = chooser()
    some.enter("a", request())
    some.enter("b", request())
    said = replies(some, ["a", "b"], 20)
    assert said["a"] != said["b"]


def test_min_new_forbids_the_stop_tokens_and_then_no_more() -> None:
    some, made = chooser(), torch.zeros(1, VOCAB)
    made[0, 4], made[0, 9], made[0, 8] = 3.0, 2.0, 1.0
    some.enter("a", request(temperature=0.0, min_new=2, stop_tokens=frozenset({4, 9})))
    assert [some.choose(["a"], made)[0].token for _ in range(3)] == [8, 8, 4]


def test_logits_that_are_not_numbers_name_their_rows_and_spoil_no_other() -> None:
    """After it, the rest of the batch says what it would have said."""
    some, fresh, made = chooser(), chooser(), logits(3, 1)
    for key in "abc":
        some.enter(key, request(seed=3))
        fresh.enter(key, request(seed=3))
    broken = made.clone()
    broken[1, 17] = math.nan
    with pytest.raises(Unchoosable, match="the model returned logits that are not numbers") as caught:
        some.choose(["a", "b", "c"], broken)
    assert list(caught.value.why) == ["b"]
    rest = some.choose(["a", "c"], broken[[0, 2]])
    assert rest == fresh.choose(["a", "c"], made[[0, 2]])
    with pytest.raises(ValueError, match="not numbers"):
        some.choose(["c"], torch.full((1, VOCAB), -math.inf))


def test_a_row_keeps_the_tokens_whose_bits_are_set() -> None:
    """By NumPy's unpacking, in a vocabulary that ends inside a byte; a row without a grammar keeps all."""
    made, draw = logits(3, 6), np.random.default_rng(1)
    masks = draw.integers(0, 256, (2, -(-VOCAB // 8)), dtype=np.uint8)
    rows = [SimpleNamespace(follower=None)]
    for mask in masks:
        follower = SimpleNamespace(allowed=lambda may_end, mask=mask: mask)
        rows.append(SimpleNamespace(follower=follower, said=0, request=SimpleNamespace(min_new=0)))
    left = made.clone()
    _constrain(left, SimpleNamespace(rows=rows, constrained=[1, 2], keys=[0, 1, 2]))  # type: ignore[arg-type]
    kept = np.unpackbits(masks, axis=1, count=VOCAB, bitorder="little").astype(bool)
    assert torch.equal(left[0], made[0])
    assert torch.equal(left[1:], torch.where(torch.from_numpy(kept), made[1:], -math.inf))


def test_what_a_model_does_not_have_is_refused_on_entering() -> None:
    with pytest.raises(ValueError, match="logit_bias: token 50; this model has ids 0 to 49"):
        chooser().enter("a", request(logit_bias={50: 1.0}))


def test_a_greedy_batch_copies_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it make settings, counts or uniforms."""
    for name in ("edited", "drawn", "probabilities", "uniform"):
        monkeypatch.setattr(f"assay.engine.chooser.{name}", None)
    some = chooser()
    for key in range(16):
        some.enter(key, request(temperature=0.0))
    made = logits(16, 2)
    assert [c.token for c in some.choose(range(16), made)] == made.argmax(-1).tolist()


@given(seed=st.integers(0, 30), top_p=st.sampled_from([0.1, 0.7, 0.95]), top_k=st.sampled_from([0, 7]))
def test_the_nucleus_is_the_smallest_set_and_keeps_what_is_as_likely(seed: int, top_p: float, top_k: int) -> None:
    """By sorting in Python, on logits with many ties (as those of a model in bfloat16)."""
    made = logits(1, seed).mul(0.5).round()
    kept = probabilities(made, Settings.of([SamplingParams(top_p=top_p, top_k=top_k)]))[0] > 0
    values = sorted(made[0].double().tolist(), reverse=True)
    if top_k:
        values = [v for v in values if v >= values[top_k - 1]]
    total, mass, least = sum(map(math.exp, values)), 0.0, values[0]
    for value in values:
        if mass >= top_p * total * (1 + 1e-6):
            break
        mass, least = mass + math.exp(value), value
    assert kept.tolist() == [v >= least for v in made[0].tolist()]
