"""Generation against recomputing everything for every token; sessions against fresh ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.data.tokenizers import Tokenizer
from assay.engine.engine import generate
from assay.engine.request import Request, SamplingParams
from assay.engine.runner import Runner, Token
from assay.engine.sampler import Settings, sample, uniform
from assay.engine.session import Session
from assay.model.lm import LM, build
from tests.cache.models import VOCAB, logits, model, spec, tokens
from tests.engine.test_text import tokenizer

TEXT = tokenizer()
GREEDY = SamplingParams(temperature=0.0)
KINDS = ("full", "window", "linear")


def alone(lm: LM, request: Request) -> list[int]:
    """Without a cache, a batch or a runner: one full pass for each token."""
    ids = list(request.prompt)
    for number in range(request.max_new):
        last = logits(lm, torch.tensor([ids]))[0, -1:]
        said = torch.bincount(torch.tensor(ids[len(request.prompt) :], dtype=torch.long), minlength=VOCAB)[None]
        seen = torch.bincount(torch.tensor(ids), minlength=VOCAB)[None] > 0
        u = torch.tensor([uniform(request.sampling.seed or 0, number)], dtype=torch.float64)
        ids.append(int(sample(last, Settings.of([request.sampling]), u, (seen, said))))
        if ids[-1] in request.stop_tokens:
            break
    return ids[len(request.prompt) :]


def replies(made: Sequence[Token]) -> list[list[int]]:
    out: dict[int, list[int]] = {}
    for token in made:
        out.setdefault(token.request, []).append(token.id)
    return [out[i] for i in sorted(out)]


def request(length: int, seed: int = 0, sampling: SamplingParams = GREEDY, **more: object) -> Request:
    return Request(prompt=tuple(tokens(1, length, seed)[0].tolist()), sampling=sampling, **more)  # type: ignore[arg-type]


REQUESTS = st.builds(
    request,
    length=st.integers(1, 11),
    seed=st.integers(0, 9),
    sampling=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0]),
        top_p=st.sampled_from([0.6, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 3),
    ),
    max_new=st.integers(1, 5),
    stop_tokens=st.frozensets(st.integers(0, VOCAB - 1), max_size=4),
)


@given(asked=st.lists(REQUESTS, min_size=1, max_size=4), chunk=st.integers(1, 9))
@settings(max_examples=8)
def test_batches_equal_requests_alone(asked: list[Request], chunk: int) -> None:
    """Different lengths, settings and ends in one batch, prefilled in chunks: each reply is its own."""
    lm = model(("full", "window"))
    assert replies(list(generate(lm, TEXT, asked, chunk))) == [alone(lm, each) for each in asked]


@pytest.mark.parametrize("position", ["none", "raw", "learned", "alibi"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_models(kind: str, position: str) -> None:
    lm, asked = model((kind, kind), position), [request(9, 1, max_new=5), request(3, 2, max_new=6)]
    assert replies(list(generate(lm, TEXT, asked, 4))) == [alone(lm, each) for each in asked]


def test_seeds() -> None:
    lm = model(("full",))
    first, again, other = (
        replies(list(generate(lm, TEXT, [request(4, sampling=SamplingParams(seed=s), max_new=12)])))[0]
        for s in (1, 1, 2)
    )
    assert first == again != other
    unseeded = [
        replies(list(generate(lm, TEXT, [request(4, sampling=SamplingParams(), max_new=12)]))) for _ in range(2)
    ]
    assert unseeded[0] != unseeded[1]


def test_finish_says_why_and_stop_text_ends_a_reply() -> None:
    lm = model(("full",))
    whole = list(generate(lm, TEXT, [request(5, max_new=8)]))
    assert [t.finish for t in whole] == [None] * 7 + ["length"]
    ids = [t.id for t in whole]
    stopped = list(generate(lm, TEXT, [request(5, max_new=8, stop_tokens=frozenset({ids[3]}))]))
    assert [t.id for t in stopped] == ids[: ids.index(ids[3]) + 1] and stopped[-1].finish == "stop"
    assert stopped[-1].text == ""
    word = bytes(ids[2:4]).decode()
    early = list(generate(lm, TEXT, [request(5, max_new=8, stop=(word,))]))
    assert early[-1].finish == "stop"
    assert "".join(t.text for t in early) == bytes(ids).decode().partition(word)[0]


def test_a_learned_table_is_never_left() -> None:
    """The error names the numbers; the last position is still used."""
    lm = model(("full",), "learned")
    with pytest.raises(ValueError, match=r"60 tokens and 5 new ones are 65; .* 64 tokens"):
        list(generate(lm, TEXT, [request(60, max_new=5)]))
    assert len(list(generate(lm, TEXT, [request(60, max_new=4)]))) == 4
    assert len(list(generate(model(("full",)), TEXT, [request(60, max_new=8)]))) == 8


def test_what_cannot_be_continued_is_refused_by_name() -> None:
    lm = model(("full",))
    with pytest.raises(ValueError, match="prompt token 19; this model has ids 0 to 18"):
        list(generate(lm, TEXT, [Request(prompt=(1, 19))]))
    both = build(spec(("full",), sees={"causal": False}))
    with pytest.raises(ValueError, match=r"blocks\.0\.mixer.*later tokens"):
        Runner(both, None)  # type: ignore[arg-type]
    assert list(generate(lm, TEXT, [])) == []


def test_dropout_is_off() -> None:
    tree = spec(("full",)).model_dump()
    tree["blocks"]["full"]["dropout"] = 0.5
    lm = build(type(spec(("full",))).model_validate(tree), 3).double().train()
    asked = request(6, max_new=6)
    first = replies(list(generate(lm, TEXT, [asked])))
    assert first == [alone(lm.eval(), asked)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_equals_a_fresh_one(kind: str) -> None:
    """Turns that go on, that go back, and that were left half way: only the time differs."""
    lm = model((kind, "full"))
    session, ids = Session(lm, TEXT, 64), tuple(tokens(1, 40, 4)[0].tolist())
    stored: list[int] = []
    for length, read in ((6, 5), (11, 2), (14, 5), (9, 5), (9, 5), (30, 1), (34, 5)):
        asked = Request(prompt=ids[:length], sampling=GREEDY, max_new=5)
        reply = session.reply(asked)
        got = [next(reply).id for _ in range(read)]
        stored.append(session.used - read)
        reply.close()  # type: ignore[attr-defined]
        session.engine.runner.cache.check_integrity()
        assert got == alone(lm, asked)[:read]
    assert stored == [6, 11, 14, 9, 9, 30, 34]
    with pytest.raises(ValueError, match="60 tokens and 5 new ones are 65; there is room for 64"):
        next(session.reply(Request(prompt=ids + ids[:20], max_new=5)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_computes_only_what_is_new(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is used again in whole pages of 16 tokens, by windows and recurrent layers too."""
    lm, ids = model((kind, "full")), tuple(tokens(1, 50, 4)[0].tolist())
    session, seen = Session(lm, TEXT, 64), []
    step = Runner.step
    monkeypatch.setattr(
        Runner, "step", lambda self, work, kept: seen.append(sum(len(w.ids) for w in work)) or step(self, work, kept)
    )
    for length in (35, 44):
        list(session.reply(Request(prompt=ids[:length], sampling=GREEDY, max_new=1)))
    assert sum(seen) == 35 + 44 - 32
    session.reset()
    seen.clear()
    list(session.reply(Request(prompt=ids[:44], sampling=GREEDY, max_new=1)))
    assert sum(seen) == 44


def test_a_failure_inside_a_step_loses_no_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off inside a forward pass, some layers have stored the tokens and some have not: the session starts anew."""
    lm, asked = model(("full", "window")), request(8, max_new=6)
    session = Session(lm, TEXT, 64)
    list(session.reply(asked))
    with monkeypatch.context() as patch:
        patch.setattr(type(lm.blocks[1]), "forward", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(session.reply(request(12, max_new=6)))
    assert session.used == 0 and not session.engine.busy
    assert replies(list(session.reply(asked))) == [alone(lm, asked)]


def test_text_streams() -> None:
    """Pieces of all requests, in rounds, make each request's text."""
    lm, asked = model(("full",)), [request(3, 1, max_new=4), request(5, 2, max_new=2)]
    made = list(generate(lm, Tokenizer(TEXT.hf), asked))
    assert [t.request for t in made] == [0, 1, 0, 1, 0, 0]
    assert ["".join(t.text for t in made if t.request == i) for i in (0, 1)] == [
        bytes(alone(lm, each)).decode() for each in asked
    ]
